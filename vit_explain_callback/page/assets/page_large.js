'use strict';
// One image, enlarged: its maps in every run, its curve, and its history as a strip.

let largeFrames = /** @type {ReturnType<typeof frameOf>[]} */ ([]);
let strip = /** @type {{canvas: HTMLCanvasElement, button: HTMLButtonElement, r: number, snapshot: number}[]} */ ([]);
let ownChart = /** @type {ReturnType<typeof chartOf> | null} */ (null);
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
    const chosen = Array.from({ length: count }, (_, i) =>
      Math.round((i * (each.steps.length - 1)) / Math.max(1, count - 1)),
    );
    return chosen.map((snapshot) => {
      const canvas = element('canvas', { 'aria-hidden': 'true' });
      const button = element(
        'button',
        { onclick: () => moveToPlace(places[r][snapshot]) },
        canvas,
        `step ${each.steps[snapshot]}`,
      );
      return { canvas, button, r, snapshot };
    });
  });
  const rows = runs.map((_, r) =>
    element('div', { className: 'row' }, ...strip.filter((each) => each.r === r).map((each) => each.button)),
  );
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
    return element(
      'p',
      {},
      `${several ? `${each.name}: ` : ''}${prediction}${change && `, ${change}`}.${target} Step ${each.steps[snapshots[r]]}.`,
    );
  });
  part('facts', 'div').replaceChildren(...facts);
  ownChart?.moveTo(positions[state.position], snapshots);
  for (const each of strip) each.button.setAttribute('aria-current', String(each.snapshot === snapshots[each.r]));
}

/** The maps of the enlarged image side by side, as an address of a PNG file. */
function largePicture() {
  const [height, width] = data.size;
  const canvas = element('canvas', { width: width * runs.length, height });
  largeFrames.forEach((frame, r) => canvas.getContext('2d')?.drawImage(frame.canvas, r * width, 0));
  return canvas.toDataURL();
}
