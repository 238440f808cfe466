'use strict';
// What is shown, where the runs stand, and the images as tiles.

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {string} id
 * @param {K} kind
 * @returns {HTMLElementTagNameMap[K]}
 */
function part(id, kind) {
  const found = document.getElementById(id);
  if (found?.localName !== kind) throw new Error(`There is no ${kind} #${id} in the page.`);
  return /** @type {HTMLElementTagNameMap[K]} */ (found);
}

const runs = data.runs;
const several = runs.length > 1;
const images = Array.from({ length: data.images }, (_, image) => image);
const slider = part('position', 'input');
const methodChoice = part('method', 'select');
const statistic = part('statistic', 'select');
const controls = part('controls', 'form');
const large = part('large', 'dialog');

/** What can be shown, in the order of the keys 1, 2, …; what it says when a patch is read. */
const MODES = /** @type {Record<string, {name: string, unit: string}>} */ ({
  overlay: { name: 'overlay', unit: '× uniform' },
  baseline: { name: 'against baseline', unit: '× uniform against the baseline' },
  previous: { name: 'against previous', unit: '× uniform against the previous snapshot' },
  ...(several && { run: { name: `against ${runs[0].name}`, unit: `× uniform against ${runs[0].name}` } }),
  raw: { name: 'map', unit: '× uniform' },
  plain: { name: 'image', unit: '× uniform' },
});
/** @type {Map<string, {name: string, key: (image: number) => number}>} By its value in the list; smallest first. */
const SORTS = new Map([
  [
    'worst',
    {
      name: 'changed most at any time',
      key: (image) => least(runs.flatMap((_, r) => run(r).drift.map((row) => row[image]))),
    },
  ],
  ['now', { name: 'changed most now', key: (image) => least(runs.map((_, r) => run(r).drift[snapshots[r]][image])) }],
  ['probe', { name: 'as in the probe batch', key: (image) => image }],
]);
if (data.labels) SORTS.set('label', { name: 'label', key: (image) => data.labels?.[image] ?? Infinity });
if (!runs[0].output)
  SORTS.set('flipped', { name: 'changed predictions first', key: (image) => -Number(flipped(image)) });
for (const name of Object.keys(data.regions)) {
  SORTS.set(`lift ${name}`, {
    name: `lift of ${name}`,
    key: (image) => -(run(0).lift[name][snapshots[0]][image] ?? -Infinity),
  });
}

const state = { position: 0, method: Object.keys(runs[0].methods)[0], mode: 'overlay', image: -1 };
/** Ascending places on the slider, and the place of each run's snapshots. */
let positions = /** @type {number[]} */ ([]);
let places = /** @type {number[][]} */ ([]);
/** The snapshot at which each run stands. */
let snapshots = runs.map(() => 0);
let playing = 0;
const modeButtons = /** @type {Record<string, HTMLButtonElement>} */ ({});

/** @param {number} index of a run */
const run = (index) => runs[index].methods[state.method];
/** @param {(number | null)[]} values */
const least = (values) =>
  values.reduce((/** @type {number} */ low, value) => Math.min(low, value ?? Infinity), Infinity);
/** @param {number} image */
const flipped = (image) => runs.some((each, r) => each.prediction[snapshots[r]][image] !== each.prediction[0][image]);

// ---- Maps -----------------------------------------------------------------------------------------------------------

/**
 * What is drawn of an image's map in a run; null where it is degenerate, or has other patches than what it is compared
 * with.
 * @param {number} r
 * @param {number} image
 * @param {number} snapshot
 */
function valuesOf(r, image, snapshot) {
  const values = mapOf(run(r), snapshot, image);
  const subtracted = new Map([
    ['baseline', [r, 0]],
    ['previous', [r, Math.max(0, snapshot - 1)]],
  ]);
  if (r > 0) subtracted.set('run', [0, snapshots[0]]);
  const from = subtracted.get(state.mode);
  if (!values || !from) return values;
  const other = mapOf(run(from[0]), from[1], image);
  const comparable = other && String(run(from[0]).grid) === String(run(r).grid);
  return comparable ? values.map((value, patch) => value - other[patch]) : null;
}

const pictures = /** @type {Promise<Picture>[]} */ ([]);

/**
 * @param {HTMLCanvasElement} canvas
 * @param {number} r
 * @param {number} image
 * @param {number} snapshot
 */
async function draw(canvas, r, image, snapshot) {
  const picture = await (pictures[image] ??= pictureOf(image));
  const strength = Number(part('opacity', 'input').value) / 100;
  const [plain, alone] = [state.mode === 'plain', state.mode === 'raw'];
  const values = valuesOf(r, image, snapshot);
  // One limit for all runs: that of the first.
  const shares = values && values.map((value) => value / run(0).limit);
  const layer = shares && { values: shares, grid: run(r).grid };
  paint(canvas, picture, layer, { strength, smooth: part('smooth', 'input').checked, plain, alone });
}

/**
 * The frame of an image in a run: its canvas, the outlines of its regions, and the run's name if there are several.
 * @param {number} r
 * @param {number} image
 */
function frameOf(r, image) {
  const [height, width] = data.size;
  const canvas = element('canvas', { className: 'map', width, height });
  const outlines = element('canvas', { className: 'outlines', width, height, 'aria-hidden': 'true' });
  paintOutlines(outlines, image);
  const frame = element('span', { className: 'frame' }, canvas, outlines);
  const whole = element('span', { className: 'run' }, frame);
  if (several) whole.append(element('span', { className: 'note' }, runs[r].name));
  frame.onpointermove = (event) => {
    const box = frame.getBoundingClientRect();
    const [rows, columns] = run(r).grid;
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const tip = part('tip', 'div');
    tip.textContent = patchText(r, image, row * columns + column);
    tip.hidden = false;
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    Object.assign(tip.style, {
      left: `${Math.max(8, left)}px`,
      top: `${Math.min(event.clientY + 16, window.innerHeight - 60)}px`,
    });
    // A modal dialog hides all that is not in it.
    (large.open ? large : document.body).append(tip);
    framePatch(frame, r, row * columns + column);
  };
  frame.onpointerleave = () => {
    part('tip', 'div').hidden = true;
    patchFrame.remove();
  };
  return { whole, frame, canvas };
}

const patchFrame = element('span', { className: 'cell' });

/** @param {HTMLElement} frame @param {number} r @param {number} patch */
function framePatch(frame, r, patch) {
  const [rows, columns] = run(r).grid;
  const [row, column] = [Math.floor(patch / columns), patch % columns];
  Object.assign(patchFrame.style, { left: `${(column / columns) * 100}%`, width: `${100 / columns}%` });
  Object.assign(patchFrame.style, { top: `${(row / rows) * 100}%`, height: `${100 / rows}%` });
  frame.append(patchFrame);
}

/** @param {number} r @param {number} image @param {number} patch */
function patchText(r, image, patch) {
  const map = mapOf(run(r), snapshots[r], image);
  const change = valuesOf(r, image, snapshots[r]);
  if (!map || !change)
    return 'There is nothing to read here: a map ranks no patches, or the two have different patches.';
  const columns = run(r).grid[1];
  const rank = 1 + map.filter((value) => value > map[patch]).length;
  const place = `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  const share = `${((map[patch] / map.length) * 100).toPrecision(2)} % of the map`;
  return `${place}: ${shown(change[patch])} ${MODES[state.mode].unit}; rank ${rank} of ${map.length}, ${share}`;
}

/** What is said of an image in a run. @param {number} r @param {number} image */
function factsOf(r, image) {
  const [each, snapshot] = [runs[r], snapshots[r]];
  if (each.output) return { prediction: `output ${shown(each.output[snapshot][image])}`, change: '' };
  const [now, first] = [each.prediction[snapshot][image], each.prediction[0][image]];
  const wrong = ![now, null, undefined].includes(data.labels?.[image]);
  return {
    prediction: `${wrong ? '✗ ' : ''}${data.classes[now]} · p ${shown(each.confidence[snapshot][image], 2)}`,
    change: now === first ? '' : `was ${data.classes[first]}`,
  };
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

/** A title for an image. @param {number} image */
const titleOf = (image) =>
  [image, data.classes[data.labels?.[image] ?? -1]].filter((text) => text !== undefined).join(' · ');

const tiles = images.map((image) => {
  const frames = runs.map((_, r) => frameOf(r, image));
  const texts = runs.map(() => ({ prediction: element('span'), change: element('span', { className: 'change' }) }));
  const drift = element('span', { className: 'drift', title: 'rank correlation with the baseline' });
  const button = element('button', { className: 'tile' });
  const lines = texts.map(({ prediction, change }) => element('span', {}, prediction, ' ', change));
  const name = element('span', { className: 'name' }, element('b', {}, titleOf(image)), drift);
  button.append(element('span', { className: 'runs' }, ...frames.map((frame) => frame.whole)), name);
  lines.forEach((line, r) => (several ? frames[r].whole : button).append(line));
  button.onclick = () => openLarge(image);
  return { image, frames, texts, drift, button, item: element('li', {}, button), visible: false };
});

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const tile = tiles.find((each) => each.item === entry.target);
      if (tile) tile.visible = entry.isIntersecting;
      if (tile?.visible) drawTile(tile);
    }
  },
  { rootMargin: '100px' },
);
tiles.forEach((tile) => watcher.observe(tile.item));

/** @param {typeof tiles[number]} tile */
function drawTile(tile) {
  tile.frames.forEach((frame, r) => draw(frame.canvas, r, tile.image, snapshots[r]));
}

/** @param {typeof tiles[number]} tile */
function describeTile(tile) {
  const values = runs.map((_, r) => shown(run(r).drift[snapshots[r]][tile.image], 2));
  say(tile.drift, `ρ ${values.join(' | ')}`);
  tile.texts.forEach((text, r) => {
    const { prediction, change } = factsOf(r, tile.image);
    say(text.prediction, prediction);
    say(text.change, change);
  });
}

/** The label of an image; its target where there are no labels. @param {number} image */
const classOfImage = (image) => (data.labels || runs[0].target)[image];

/** Put the tiles in order, and leave out those that the filters do. */
function arrange() {
  const sort = SORTS.get(part('sort', 'select').value) || { key: (/** @type {number} */ image) => image };
  const only = part('class', 'select').value;
  const keys = images.map(sort.key);
  const order = [...images].sort((a, b) => keys[a] - keys[b] || a - b);
  const passing = order.filter(
    (image) =>
      (only === '' || String(classOfImage(image)) === only) && (!part('flipped', 'input').checked || flipped(image)),
  );
  const list = part('tiles', 'ul');
  const items = passing.map((image) => tiles[image].item);
  if (items.length !== list.children.length || items.some((item, i) => item !== list.children[i])) {
    const focused = /** @type {HTMLElement | null} */ (document.activeElement);
    list.replaceChildren(...items);
    if (focused && list.contains(focused)) focused.focus();
  }
  part('nothing', 'p').hidden = items.length > 0;
}
