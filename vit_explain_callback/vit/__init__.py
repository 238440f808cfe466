"""Look inside a Vision Transformer: its attention, its blocks and its tokens.

How the parts fit together, in the order in which to read them:

1. `recorder` records attention while a model runs, as `calls`; `attention_ops`, `softmax` and `products` recognise it.
2. `blocks` tells the stack of blocks from an attention pool. `ports` checks, in a `sites.Trace` of one pass, that only
   their attention mixes tokens, and finds where tokens enter and leave them.
3. `tokens` describes the token layout, which `timm` reads off timm's models and `infer_tokens` finds by experiment.
4. `session` runs a twin through an `adapter` and asks for all of this. `block_logits` and `token_set` build on it.
5. `losses`, with `sources`, finds the outputs that a training step's loss is computed of, and `locate` the ViT behind
   them.

Any model works whose blocks all attend over one set of tokens, by `scaled_dot_product_attention`,
`nn.MultiheadAttention`, or a plain softmax that is multiplied with the values. What cannot be determined is refused
with an error, and `prefix_tokens=` and `grid_size=` state the layout.

`python -m tests.coverage_sweep` compares every name of timm 1.0.31, shrunk, with random weights, in float64, with
the oracle to 1e-9; none failed:

| timm family | names | equal to the oracle | refused |
|---|---|---|---|
| `vision_transformer` | 163 | 158 | 5: two attentions a block (`*_18x2`), differential attention |
| `deit`, `beit` | 23 | 23 | |
| `eva` (EVA-02, DINOv3, PE, …) | 65 | 65 | |
| `vision_transformer_hybrid`, `vision_transformer_relpos` | 28 | 28 | |
| `naflexvit` | 14 | 14 | |
| `cait`, `convit`, `tnt` | 16 | 0 | 16: attention changed after its softmax; two levels of tokens |
| Swin, MViT, PVT, XCiT, PiT, CrossViT, SAM, VOLO, DaViT, LeViT, Hiera, Twins | 26 tried | 0 | no global attention |

Also tested against the oracle: Hugging Face ViT, DeiT, DINOv2 (with registers), DINOv3, BEiT, SigLIP and CLIP with
`sdpa` and `eager`, `TimmWrapper`; torchvision; `nn.TransformerEncoder`; lucidrains' `ViT` and `SimpleViT`. LoRA,
parametrized weights, `torch.compile`, DDP, frozen weights and gradient checkpointing give the same maps.

A head with one logit counts as two classes. With several labels per image, the target is the class with the
highest logit at the baseline, unless labels are given. If a classifier reads the class token and the mean of patches
(DINOv2), each gets half the relevance.
"""
