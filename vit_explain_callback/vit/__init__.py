"""Look inside a Vision Transformer: its attention, its blocks and its tokens.

Any model works whose blocks all attend over one set of tokens. Attention is seen in `scaled_dot_product_attention`, in
`nn.MultiheadAttention` and in a plain softmax that is multiplied with the values. Blocks are told from the modules that
ran it; of models other than timm's, prefix tokens, grid and readout are found by experiment (`infer_tokens`). What
cannot be told is refused, and `prefix_tokens=` and `grid_size=` state it.

`python -m tests.coverage_sweep` tries every name of timm 1.0.31, shrunk, with random weights, in float64, against the
oracle to 1e-9; none failed:

| timm family | names | equal to the oracle | refused |
|---|---|---|---|
| `vision_transformer` | 163 | 158 | 5: two attentions a block (`*_18x2`), differential attention |
| `deit`, `beit` | 23 | 23 | |
| `eva` (EVA-02, DINOv3, PE, …) | 65 | 65 | |
| `vision_transformer_hybrid`, `vision_transformer_relpos` | 28 | 28 | |
| `naflexvit` | 14 | 14 | |
| `cait`, `convit`, `tnt` | 16 | 0 | 16: attention changed after its softmax; two levels of tokens |
| Swin, MViT, PVT, XCiT, PiT, CrossViT, SAM, VOLO, DaViT, LeViT, Hiera, Twins | 26 tried | 0 | no global attention |

Tested against the oracle as well: Hugging Face ViT, DeiT, DINOv2 (with registers), DINOv3, BEiT, SigLIP and CLIP with
`sdpa` and `eager`, `TimmWrapper`; torchvision; `nn.TransformerEncoder`; lucidrains' `ViT` and `SimpleViT`. LoRA,
parametrized weights, `torch.compile`, DDP-wrapped, frozen, gradient checkpointing: the same maps.

A head with one logit counts as two classes. With several labels an image, the target is the class with the highest
logit at the baseline, unless labels are given. A classifier that reads class token and mean of patches side by side
(DINOv2) counts half for each.
"""
