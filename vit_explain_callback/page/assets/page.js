'use strict';
// The page: one position along the runs, and everything that stands by it.

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
let addressing = 0;

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
  part('where', 'span').textContent = `step ${steps}`;
  arrange();
  tiles.forEach(describeTile);
  tiles.filter((tile) => tile.visible && tile.item.isConnected).forEach(drawTile);
  for (const chart of [...charts, scalarChart?.chart]) chart?.moveTo(place, snapshots);
  heatMaps.forEach((map, r) => map.moveTo(snapshots[r]));
  if (large.open) renderLarge();
  // Browsers refuse to change the address many times a second.
  clearTimeout(addressing);
  addressing = window.setTimeout(writeAddress, 200);
}

/** The colours with their ends. */
function legendOf() {
  if (state.mode === 'plain') return ['The image itself.'];
  const signed = state.mode in { baseline: 0, previous: 0, run: 0 } || runs.some((_, r) => run(r).signed);
  const [limit, width] = [shown(run(0).limit), signed ? 511 : 256];
  const canvas = element('canvas', { className: 'scale', width, height: 1, 'aria-hidden': 'true' });
  const pixels = new Uint8ClampedArray(colours.subarray(colours.length - 4 * width));
  canvas.getContext('2d')?.putImageData(new ImageData(pixels, width, 1), 0, 0);
  return [signed ? `−${limit} ` : '0 ', canvas, ` ${signed ? '+' : ''}${limit} ${MODES[state.mode].unit}`];
}

// ---- Addresses ------------------------------------------------------------------------------------------------------

function writeAddress() {
  if (location.protocol === 'about:') return; // within another page, as in a notebook, it has none
  const words = new URLSearchParams({
    step: String(runs[0].steps[snapshots[0]]),
    method: state.method,
    mode: state.mode,
  });
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
  for (const [mode, button] of Object.entries(modeButtons))
    button.setAttribute('aria-pressed', String(mode === state.mode));
  part('scale', 'p').replaceChildren(...legendOf());
  part('large-scale', 'p').replaceChildren(...legendOf());
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
  // What a control does with a key itself it keeps.
  const taken =
    target.matches('select, input[type=search]') ||
    (target.matches('input[type=range]') && event.key.startsWith('Arrow'));
  if (event.ctrlKey || event.metaKey || event.altKey || taken) return;
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
  const units = /** @type {[string, number][]} */ ([
    ['day', 1440],
    ['hour', 60],
    ['minute', 1],
  ]);
  const [unit, long] = units.find((each) => minutes >= each[1]) || ['', 1];
  const count = Math.floor(minutes / long);
  const age = unit ? `${count} ${unit}${count === 1 ? '' : 's'} ago` : 'just now';
  const last = Math.max(...runs.flatMap((each) => each.steps));
  part('age', 'p').textContent = `Written ${age}, at step ${last}. Reload it to see whether the run has gone on.`;
  const thinned = runs
    .filter((each) => each.taken > each.steps.length)
    .map(
      (each) =>
        `${each.name} shows ${each.steps.length} of its ${each.taken} snapshots, spaced by the logarithm of the step. `,
    );
  part('about', 'p').textContent =
    `${thinned.join('')}Maps are stored in 8 bits: a value is wrong by at most 1/510 of its map's range.`;
}

function prepare() {
  Object.keys(MODES).forEach((mode, index) => {
    const how = { type: 'button', title: `key ${index + 1}`, onclick: () => chooseMode(mode) };
    modeButtons[mode] = element('button', how, MODES[mode].name);
  });
  part('modes', 'div').append(...Object.values(modeButtons));
  fill(
    methodChoice,
    Object.keys(runs[0].methods).map((name) => [name, name]),
  );
  fill(
    part('sort', 'select'),
    [...SORTS].map(([value, { name }]) => [value, name]),
  );
  const classes = [...new Set(images.map(classOfImage).filter((each) => each !== null))].sort((a, b) => a - b);
  fill(part('class', 'select'), [
    ['', 'all'],
    ...classes.map((each) => /** @type {[string, string]} */ ([String(each), data.classes[each]])),
  ]);
  const statistics = Object.keys(runs[0].blocks).filter((name) => runs.every((each) => name in each.blocks));
  fill(
    statistic,
    statistics.map((name) => [name, name.replaceAll('_', ' ')]),
  );
  part('blocks-section', 'section').hidden = !statistics.length;
  for (const [id, needed] of /** @type {[string, boolean][]} */ ([
    ['outlines', Object.keys(data.regions).length > 0],
    ['by', several],
    ['class', !runs[0].output],
    ['flipped', !runs[0].output],
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
  statistic.onchange = () => {
    drawBlocks();
    render();
  };
  part('search', 'input').oninput = findScalars;
  controls.onsubmit = (event) => event.preventDefault();
  controls.oninput = render;
  part('outlines', 'input').onchange = () => document.body.classList.toggle('bare', !part('outlines', 'input').checked);
  part('by', 'select').onchange = () => {
    align();
    drawCharts();
    if (scalarChart) showScalar(scalarChart.tag);
    moveToPlace(places[0][snapshots[0]]);
  };
  part('before', 'button').onclick = () => openBeside(-1);
  part('after', 'button').onclick = () => openBeside(1);
  part('close', 'button').onclick = () => large.close();
  large.onclose = () => {
    tiles[state.image].button.focus();
    writeAddress();
  };
  part('save', 'a').onclick = () => {
    part('save', 'a').href = largePicture();
  };
  document.onkeydown = onKey;
  window.onhashchange = readAddress;
  window.onbeforeprint = () => tiles.forEach(drawTile);
}

prepare();
listen();
align();
state.position = positions.length - 1;
readAddress();
for (const image of images) pictures[image] ??= pictureOf(image);
setInterval(describePage, 60000);
