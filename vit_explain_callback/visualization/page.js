'use strict';
// The page: one position along the runs, and everything that stands by it.

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
  baseline: { name: 'change from the baseline', unit: '× uniform against the baseline' },
  previous: { name: 'change from the previous snapshot', unit: '× uniform against the previous snapshot' },
  ...(several && { run: { name: `change from ${runs[0].name}`, unit: `× uniform against ${runs[0].name}` } }),
  raw: { name: 'map alone', unit: '× uniform' },
  plain: { name: 'image alone', unit: '× uniform' },
});
/** @type {Map<string, {name: string, key: (image: number) => number}>} By its value in the list; smallest first. */
const SORTS = new Map([
  ['worst', { name: 'changed most at any time', key: (image) => least(run(0).drift.map((row) => row[image])) }],
  ['now', { name: 'changed most now', key: (image) => least(runs.map((_, r) => run(r).drift[snapshots[r]][image])) }],
  ['probe', { name: 'as in the probe batch', key: (image) => image }],
]);
if (data.labels) SORTS.set('label', { name: 'label', key: (image) => data.labels?.[image] ?? 0 });
if (!runs[0].output) SORTS.set('flipped', { name: 'changed predictions first', key: (image) => -Number(flipped(image)) });
for (const name of Object.keys(data.regions)) {
  SORTS.set(`lift ${name}`, { name: `lift of ${name}`, key: (image) => -(run(0).lift[name][snapshots[0]][image] ?? -Infinity) });
}

const state = { position: 0, method: Object.keys(runs[0].methods)[0], mode: 'overlay', image: -1 };
/** Ascending places on the slider, and the place of each run's snapshots. */
let positions = /** @type {number[]} */ ([]);
let places = /** @type {number[][]} */ ([]);
/** The snapshot at which each run stands. */
let snapshots = runs.map(() => 0);
let playing = 0;

/** @param {number} index of a run */
const run = (index) => runs[index].methods[state.method];
/** @param {(number | null)[]} values */
const least = (values) => values.reduce((/** @type {number} */ low, value) => Math.min(low, value ?? Infinity), Infinity);
/** @param {number} image */
const flipped = (image) => runs.some((each, r) => each.prediction[snapshots[r]][image] !== each.prediction[0][image]);
/** @param {number} share */
const percent = (share) => `${Math.round(share * 100)} %`;

// ---- Maps -----------------------------------------------------------------------------------------------------------

/**
 * What is drawn of an image's map in a run; null where it is degenerate.
 * @param {number} r
 * @param {number} image
 * @param {number} snapshot
 */
function valuesOf(r, image, snapshot) {
  const values = mapOf(run(r), snapshot, image);
  const subtracted = new Map([['baseline', [r, 0]], ['previous', [r, Math.max(0, snapshot - 1)]]]);
  if (r > 0) subtracted.set('run', [0, snapshots[0]]);
  const from = subtracted.get(state.mode);
  if (!values || !from) return values;
  const other = mapOf(run(from[0]), from[1], image);
  return other && values.map((value, patch) => value - other[patch]);
}

/** Whether 0 stands in the middle of the colours of a run. @param {number} r */
function isSigned(r) {
  return run(r).signed || state.mode === 'baseline' || state.mode === 'previous' || (state.mode === 'run' && r > 0);
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
  const look = { strength, smooth: part('smooth', 'input').checked, plain: state.mode === 'plain', opaque: state.mode === 'raw' };
  // One colour scale for all runs: that of the first.
  const method = { ...run(r), limit: run(0).limit };
  paint(canvas, picture, layerOf(valuesOf(r, image, snapshot), method, isSigned(r)), look);
}

/**
 * The frame of an image in a run: its canvas, the outlines of its regions, and the run's name if there are several.
 * @param {number} r
 * @param {number} image
 */
function frameOf(r, image) {
  const canvas = element('canvas', { className: 'map' });
  const outlines = element('canvas', { className: 'outlines', 'aria-hidden': 'true' });
  if (Object.keys(data.regions).length) paintOutlines(outlines, image);
  const frame = element('div', { className: 'frame' }, canvas, outlines);
  const whole = element('div', { className: 'run' }, frame);
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
    Object.assign(tip.style, { left: `${Math.max(8, left)}px`, top: `${Math.min(event.clientY + 16, window.innerHeight - 60)}px` });
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

const patchFrame = element('div', { className: 'cell' });

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
  if (!map || !change) return 'The map is degenerate: it ranks no patches.';
  const columns = run(r).grid[1];
  const rank = 1 + map.filter((value) => value > map[patch]).length;
  const place = `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  const share = `${((map[patch] / map.length) * 100).toPrecision(2)} % of the map`;
  return `${place}: ${shown(change[patch])} ${MODES[state.mode].unit}; rank ${rank} of ${map.length}, ${share}`;
}

/** What is said of an image in a run. @param {number} r @param {number} image */
function factsOf(r, image) {
  const [each, snapshot] = [runs[r], snapshots[r]];
  if (each.output) return { prediction: `output ${shown(each.output[snapshot][image])}`, change: '', wrong: false };
  const [now, first] = [each.prediction[snapshot][image], each.prediction[0][image]];
  return {
    prediction: `${data.classes[now]} ${percent(each.confidence[snapshot][image] ?? NaN)}`,
    change: now === first ? '' : `was ${data.classes[first]}`,
    wrong: data.labels !== null && data.labels[image] !== now,
  };
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

/** A title for an image. @param {number} image */
const titleOf = (image) => `${image}${data.labels ? ` · ${data.classes[data.labels[image]]}` : ''}`;

const tiles = images.map((image) => {
  const frames = runs.map((_, r) => frameOf(r, image));
  const texts = runs.map(() => element('span', { className: 'text' }));
  const drift = element('span', { className: 'drift', title: 'rank correlation with the baseline' });
  const button = element('button', { className: 'tile' });
  button.append(
    element('div', { className: 'runs' }, ...frames.map((frame) => frame.whole)),
    element('span', { className: 'name' }, element('b', {}, titleOf(image)), drift),
    ...texts,
  );
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
  const values = runs.map((_, r) => shown(run(r).drift[snapshots[r]][tile.image]));
  tile.drift.textContent = `ρ ${values.join(' | ')}`;
  tile.texts.forEach((text, r) => {
    const facts = factsOf(r, tile.image);
    text.replaceChildren(element('span', { className: facts.wrong ? 'wrong' : '' }, facts.prediction + (facts.wrong ? ' ✗' : '')));
    if (facts.change) text.append(' ', element('span', { className: 'change' }, facts.change));
  });
}

/** Put the tiles in order, and leave out those that the filters do. */
function arrange() {
  const sort = SORTS.get(part('sort', 'select').value) || { key: (/** @type {number} */ image) => image };
  const only = part('class', 'select').value;
  const keys = images.map(sort.key);
  const order = [...images].sort((a, b) => keys[a] - keys[b] || a - b);
  const passing = order.filter(
    (image) =>
      (only === '' || String((data.labels || runs[0].target)[image]) === only) &&
      (!part('flipped', 'input').checked || flipped(image)),
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

// ---- Curves, blocks, scalars ----------------------------------------------------------------------------------------

let charts = /** @type {ReturnType<typeof chartOf>[]} */ ([]);
let heatMaps = /** @type {ReturnType<typeof heatMap>[]} */ ([]);
let scalarChart = /** @type {ReturnType<typeof chartOf> | null} */ (null);
let ownChart = /** @type {ReturnType<typeof chartOf> | null} */ (null);

/**
 * Lines of every run in one chart.
 * @param {string} title
 * @param {(each: Run, r: number) => Line[] | undefined} linesOf
 */
function linesOfRuns(title, linesOf) {
  return runs.flatMap((each, r) =>
    (linesOf(each, r) || [])
      .filter((line) => !(line.reference && r)) // what is compared with is drawn once
      .map((line, colour) => {
        const name = several && !line.reference ? `${line.name}, ${each.name}` : line.name;
        return { ...line, name, run: r, xs: places[r], key: `${title} ${name}`, colour };
      }),
  );
}

/**
 * @param {{title: string, note: string, range: [number, number] | null}} chart
 * @param {(each: Run, r: number) => Line[] | undefined} linesOf
 */
function chartOfRuns(chart, linesOf) {
  return chartOf(chart, linesOfRuns(chart.title, linesOf), [positions[0], positions[positions.length - 1]], moveToPlace);
}

function drawCharts() {
  const of = (/** @type {Run} */ each) => each.charts.filter((chart) => !chart.method || chart.method === state.method);
  charts = of(runs[0]).map((chart) =>
    chartOfRuns(chart, (each) => of(each).find((other) => other.title === chart.title)?.lines),
  );
  part('charts', 'div').replaceChildren(...charts.map((chart) => chart.element));
}

function drawBlocks() {
  const name = statistic.value;
  heatMaps = runs.map((each, r) =>
    heatMap(several ? `${each.name}, ${name}` : name, each.blocks[name], (_, snapshot) => moveToPlace(places[r][snapshot])),
  );
  part('blocks', 'div').replaceChildren(...heatMaps.map((map) => map.element));
}

const MOST_FOUND = 40;

function findScalars() {
  const tags = Object.keys(runs[0].scalars);
  const words = part('search', 'input').value.toLowerCase().split(/\s+/);
  const found = tags.filter((tag) => words.every((word) => tag.toLowerCase().includes(word)));
  const more = found.length > MOST_FOUND ? `; the first ${MOST_FOUND} are listed` : '';
  part('found', 'p').textContent = `${found.length} of ${tags.length} scalars${more}. Choose one to see its curve.`;
  const buttons = found.slice(0, MOST_FOUND).map((tag) => element('button', { onclick: () => showScalar(tag) }, tag));
  part('scalars', 'ul').replaceChildren(...buttons.map((button) => element('li', {}, button)));
}

/** @param {string} tag */
function showScalar(tag) {
  const chart = { title: tag, note: '', range: null };
  scalarChart = chartOfRuns(chart, (each) => each.scalars[tag] && [{ name: 'value', values: each.scalars[tag] }]);
  part('scalar', 'div').replaceChildren(scalarChart.element);
  scalarChart.moveTo(positions[state.position], snapshots);
}

// ---- One image, enlarged --------------------------------------------------------------------------------------------

let largeFrames = /** @type {ReturnType<typeof frameOf>[]} */ ([]);
let strip = /** @type {{canvas: HTMLCanvasElement, button: HTMLButtonElement, r: number, snapshot: number}[]} */ ([]);
const MOST_STRIP = 24;

/** @param {number} image */
function openLarge(image) {
  state.image = image;
  part('large-title', 'h2').textContent = `Image ${titleOf(image)}`;
  part('patch', 'p').textContent = '';
  largeFrames = runs.map((_, r) => frameOf(r, image));
  largeFrames.forEach(({ canvas, frame }, r) => {
    Object.assign(canvas, { tabIndex: 0, onkeydown: readPatches(r, image, frame) });
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `Map of image ${titleOf(image)}. The arrow keys read its patches.`);
  });
  part('large-frames', 'div').replaceChildren(...largeFrames.map((frame) => frame.whole));
  ownChart = chartOfRuns({ title: 'This image', note: '', range: [0, 1] }, (each, r) => [
    { name: 'rank correlation with the baseline', values: run(r).drift.map((row) => row[image]) },
    ...(each.output ? [] : [{ name: 'target probability', values: each.target_probability.map((row) => row[image]) }]),
  ]);
  part('own', 'div').replaceChildren(ownChart.element);
  drawStrip(image);
  if (!large.open) large.showModal();
  render();
}

/** @param {number} image */
function drawStrip(image) {
  strip = runs.flatMap((each, r) => {
    const count = Math.min(MOST_STRIP, each.steps.length);
    const chosen = Array.from({ length: count }, (_, i) => Math.round((i * (each.steps.length - 1)) / Math.max(1, count - 1)));
    return chosen.map((snapshot) => {
      const canvas = element('canvas', { 'aria-hidden': 'true' });
      const button = element('button', { onclick: () => moveToPlace(places[r][snapshot]) }, canvas, `step ${each.steps[snapshot]}`);
      return { canvas, button, r, snapshot };
    });
  });
  const rows = runs.map((_, r) => element('div', { className: 'row' }, ...strip.filter((each) => each.r === r).map((each) => each.button)));
  part('strip', 'div').replaceChildren(...rows);
  for (const { canvas, r, snapshot } of strip) draw(canvas, r, image, snapshot);
}

/** Keys that read patch after patch of a focused map. @param {number} r @param {number} image @param {HTMLElement} frame */
function readPatches(r, image, frame) {
  let patch = 0;
  return (/** @type {KeyboardEvent} */ event) => {
    const [rows, columns] = run(r).grid;
    const change = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!change) return;
    event.preventDefault();
    event.stopPropagation();
    if (patch + change >= 0 && patch + change < rows * columns) patch += change;
    part('patch', 'p').textContent = patchText(r, image, patch);
    framePatch(frame, r, patch);
  };
}

function renderLarge() {
  largeFrames.forEach(({ canvas }, r) => draw(canvas, r, state.image, snapshots[r]));
  const facts = runs.map((each, r) => {
    const { prediction, change } = factsOf(r, state.image);
    const target = each.output ? '' : ` Target ${data.classes[each.target[state.image]]}.`;
    return element('p', {}, `${several ? `${each.name}: ` : ''}${prediction}${change && `, ${change}`}.${target} Step ${each.steps[snapshots[r]]}.`);
  });
  part('facts', 'div').replaceChildren(...facts);
  ownChart?.moveTo(positions[state.position], snapshots);
  for (const each of strip) each.button.setAttribute('aria-current', String(each.snapshot === snapshots[each.r]));
}

// ---- The position ---------------------------------------------------------------------------------------------------

/** Lay the runs along the slider: by step, or from the first snapshot (0) to the last (1). */
function align() {
  const share = part('by', 'select').value === 'share';
  places = runs.map(({ steps }) => {
    const span = steps[steps.length - 1] - steps[0] || 1;
    return share ? steps.map((step) => Number(((step - steps[0]) / span).toFixed(4))) : steps;
  });
  positions = [...new Set(places.flat())].sort((a, b) => a - b);
  slider.max = String(positions.length - 1);
}

/** @param {number} place  on the axis of the curves */
function moveToPlace(place) {
  const distances = positions.map((position) => Math.abs(position - place));
  moveTo(distances.indexOf(Math.min(...distances)));
}

/** @param {number} position */
function moveTo(position) {
  state.position = Math.min(positions.length - 1, Math.max(0, position));
  render();
}

let waiting = 0;

/** Show the state, once for all changes before the next frame. */
function render() {
  waiting ||= requestAnimationFrame(() => {
    waiting = 0;
    renderNow();
  });
}

function renderNow() {
  const place = positions[state.position];
  snapshots = places.map((own) => Math.max(0, own.filter((each) => each <= place).length - 1));
  const steps = [...new Set(runs.map((each, r) => each.steps[snapshots[r]]))].join(' | ');
  slider.value = String(state.position);
  slider.setAttribute('aria-valuetext', `step ${steps}, ${state.position + 1} of ${positions.length}`);
  part('where', 'output').textContent = `step ${steps}`;
  arrange();
  tiles.forEach(describeTile);
  tiles.filter((tile) => tile.visible && tile.item.isConnected).forEach(drawTile);
  for (const chart of [...charts, scalarChart]) chart?.moveTo(place, snapshots);
  heatMaps.forEach((map, r) => map.moveTo(snapshots[r]));
  if (large.open) renderLarge();
  part('scale', 'p').replaceChildren(...scaleOf());
  writeAddress();
}

/** The colours with their ends. */
function scaleOf() {
  const signed = isSigned(several ? 1 : 0);
  const [limit, colours] = [shown(run(0).limit), signed ? diverging : sequential];
  if (state.mode === 'plain') return ['The images alone.'];
  const canvas = element('canvas', { className: 'scale', width: 256, height: 1, 'aria-hidden': 'true' });
  const pixels = new Uint8ClampedArray(colours).map((value, i) => (i % 4 === 3 ? 255 : value));
  canvas.getContext('2d')?.putImageData(new ImageData(pixels, 256, 1), 0, 0);
  return [signed ? `−${limit} ` : '0 ', canvas, ` ${signed ? '+' : ''}${limit} ${MODES[state.mode].unit}`];
}

// ---- Addresses ------------------------------------------------------------------------------------------------------

function writeAddress() {
  const words = new URLSearchParams({ step: String(runs[0].steps[snapshots[0]]), method: state.method, mode: state.mode });
  if (large.open) words.set('image', String(state.image));
  if (location.hash.slice(1) !== words.toString()) history.replaceState(null, '', `#${words}`);
}

/** Go to the moment that the address names; what it does not name stays, and what it names wrongly is passed over. */
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  const [step, image] = [words.get('step'), words.get('image')];
  const [method, mode] = [words.get('method') || '', words.get('mode') || ''];
  if (Object.hasOwn(runs[0].methods, method)) state.method = method;
  if (Object.hasOwn(MODES, mode)) state.mode = mode;
  if (step !== null && Number.isFinite(Number(step))) {
    const { steps } = runs[0];
    const distances = steps.map((each) => Math.abs(each - Number(step)));
    state.position = positions.indexOf(places[0][distances.indexOf(Math.min(...distances))]);
  }
  showChoices();
  drawCharts();
  if (image !== null && images.includes(Number(image))) openLarge(Number(image));
  render();
}

// ---- Controls -------------------------------------------------------------------------------------------------------

function showChoices() {
  methodChoice.value = state.method;
  for (const radio of controls.querySelectorAll('input[name=mode]')) {
    /** @type {HTMLInputElement} */ (radio).checked = /** @type {HTMLInputElement} */ (radio).value === state.mode;
  }
}

/** @param {string} method */
function chooseMethod(method) {
  state.method = method;
  showChoices();
  drawCharts();
  if (large.open) openLarge(state.image);
  render();
}

/** @param {string} mode */
function chooseMode(mode) {
  state.mode = mode;
  showChoices();
  if (large.open) drawStrip(state.image);
  render();
}

function togglePlay() {
  if (!playing && state.position === positions.length - 1) state.position = 0;
  clearInterval(playing);
  const step = () => (state.position < positions.length - 1 ? moveTo(state.position + 1) : togglePlay());
  playing = playing ? 0 : window.setInterval(step, Math.max(60, Math.min(500, 12000 / positions.length)));
  part('play', 'button').textContent = playing ? '❚❚ Pause' : '▶ Play';
  render();
}

/** @type {Record<string, () => void>} */
const KEYS = {
  ArrowLeft: () => moveTo(state.position - 1),
  ArrowRight: () => moveTo(state.position + 1),
  b: () => moveTo(0),
  n: () => moveTo(Infinity),
  p: togglePlay,
  m: () => {
    const names = Object.keys(runs[0].methods);
    chooseMethod(names[(names.indexOf(state.method) + 1) % names.length]);
  },
};
Object.keys(MODES).forEach((mode, index) => (KEYS[String(index + 1)] = () => chooseMode(mode)));

/** @param {KeyboardEvent} event */
function onKey(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  const writing = target.matches('select, input:not([type=checkbox])');
  if (event.ctrlKey || event.metaKey || event.altKey || writing) return;
  const beside = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const action = large.open && beside ? () => openBeside(beside) : KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

/** @param {number} change */
function openBeside(change) {
  const shownImages = [...part('tiles', 'ul').children].map((item) => tiles.findIndex((tile) => tile.item === item));
  const next = shownImages[shownImages.indexOf(state.image) + change];
  if (next !== undefined) openLarge(next);
}

/** @param {HTMLSelectElement} select @param {Iterable<[string, string]>} options  values and names */
function fill(select, options) {
  for (const [value, name] of options) select.append(element('option', { value }, name));
}

/** Say how old the page is, and what it leaves out. */
function describePage() {
  const minutes = Math.max(0, Date.now() / 1000 - data.written) / 60;
  const [unit, amount] = minutes < 60 ? ['minute', minutes] : minutes < 2880 ? ['hour', minutes / 60] : ['day', minutes / 1440];
  const age = minutes < 1 ? 'just now' : `${Math.floor(amount)} ${unit}${Math.floor(amount) === 1 ? '' : 's'} ago`;
  const last = Math.max(...runs.flatMap((each) => each.steps));
  part('age', 'p').textContent = `Written ${age}, at step ${last}. Reload it to see whether the run has gone on.`;
  const thinned = runs.filter((each) => each.taken > each.steps.length).map(
    (each) => `${each.name} shows ${each.steps.length} of its ${each.taken} snapshots, spaced by the logarithm of the step. `,
  );
  const missing = data.images - data.pictures.length;
  const grey = missing > 0 ? `The run stored no picture of ${missing} of its ${data.images} images. ` : '';
  part('about', 'p').textContent = `${thinned.join('')}${grey}Maps are stored in 8 bits: a value is wrong by at most 1/510 of its map's range.`;
}

function prepare() {
  Object.keys(MODES).forEach((mode, index) => {
    const radio = element('input', { type: 'radio', name: 'mode', value: mode, onchange: () => chooseMode(mode) });
    part('modes', 'fieldset').append(element('label', { title: `key ${index + 1}` }, radio, element('span', {}, MODES[mode].name)));
  });
  fill(methodChoice, Object.keys(runs[0].methods).map((name) => [name, name]));
  fill(part('sort', 'select'), [...SORTS].map(([value, { name }]) => [value, name]));
  const classes = [...new Set(data.labels || runs[0].target)].sort((a, b) => a - b);
  fill(part('class', 'select'), [['', 'all'], ...classes.map((each) => /** @type {[string, string]} */ ([String(each), data.classes[each]]))]);
  const statistics = Object.keys(runs[0].blocks).filter((name) => runs.every((each) => name in each.blocks));
  fill(statistic, statistics.map((name) => [name, name.replaceAll('_', ' ')]));
  part('blocks-section', 'section').hidden = !statistics.length;
  for (const [id, needed] of /** @type {[string, boolean][]} */ ([
    ['outlines', Object.keys(data.regions).length > 0], ['by', several], ['class', !runs[0].output], ['flipped', !runs[0].output],
  ])) {
    const label = document.getElementById(id)?.closest('label');
    if (label) label.hidden = !needed;
  }
  document.body.classList.toggle('several', several);
  if (statistics.length) drawBlocks();
  describePage();
  findScalars();
}

function listen() {
  slider.oninput = () => moveTo(Number(slider.value));
  part('baseline', 'button').onclick = () => moveTo(0);
  part('now', 'button').onclick = () => moveTo(Infinity);
  part('play', 'button').onclick = togglePlay;
  methodChoice.onchange = () => chooseMethod(methodChoice.value);
  statistic.onchange = () => { drawBlocks(); render(); };
  part('search', 'input').oninput = findScalars;
  controls.onsubmit = (event) => event.preventDefault();
  controls.oninput = render;
  part('outlines', 'input').onchange = (event) => document.body.classList.toggle('bare', !(/** @type {HTMLInputElement} */ (event.target).checked));
  part('by', 'select').onchange = () => {
    const place = places[0][snapshots[0]];
    const snapshot = places[0].indexOf(place);
    align();
    drawCharts();
    scalarChart = null;
    part('scalar', 'div').replaceChildren();
    moveToPlace(places[0][snapshot]);
  };
  part('before', 'button').onclick = () => openBeside(-1);
  part('after', 'button').onclick = () => openBeside(1);
  part('close', 'button').onclick = () => large.close();
  large.onclose = () => { tiles[state.image].button.focus(); writeAddress(); };
  part('save', 'a').onclick = () => { part('save', 'a').href = largeFrames[largeFrames.length - 1].canvas.toDataURL(); };
  document.onkeydown = onKey;
  window.onhashchange = readAddress;
}

prepare();
listen();
align();
state.position = positions.length - 1;
readAddress();
setInterval(describePage, 60000);
