'use strict';
// Elements, curves and the heat map of blocks. Nothing here knows the page's state: it is told where to stand.

/**
 * An element with properties (`className`, `onclick`, `aria-label`, …) and children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} name
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes('-') || key === 'role') made.setAttribute(key, String(value));
    else Object.assign(made, { [key]: value });
  }
  made.append(...children);
  return made;
}

/**
 * An SVG element.
 * @param {string} name
 * @param {Record<string, string | number>} attributes
 * @param {...(Node | string)} children
 */
function drawn(name, attributes, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.append(...children);
  return made;
}

/**
 * A number as one reads it: three significant digits or so many decimals, a dash for none.
 * @param {number | null | undefined} value
 * @param {number} [decimals]
 */
function shown(value, decimals) {
  if (value === null || value === undefined) return '–';
  return (decimals ? value.toFixed(decimals) : String(Number(value.toPrecision(3)))).replace('-', '−');
}

/**
 * Set a text; one that stays costs no layout.
 * @param {Node} node
 * @param {string} text
 */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Round numbers between two ends, about `count` of them.
 * @param {number} low
 * @param {number} high
 * @param {number} count
 */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) || 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(Number((i * step).toPrecision(6)));
  return found;
}

/**
 * A line of a chart: of a run, over the places of the run's snapshots on the axis.
 * @typedef {Line & {run: number, xs: number[], key: string, colour: number}} Drawn
 */

const FRAME = { width: 340, height: 150, left: 36, right: 8, top: 8, bottom: 18 };
/** Lines that the reader has hidden, by chart and name. @type {Set<string>} */
const hidden = new Set();

/**
 * The axes and the lines of a chart; `moveMarker` puts its marker at a place along the axis.
 * @param {Drawn[]} lines
 * @param {[number, number]} span  ends of the axis along which the lines run
 * @param {[number, number] | null} range  that the other axis shows at least
 * @param {(x: number) => void} onMove  told where the reader points
 */
function plotOf(lines, span, range, onMove) {
  const { width, height, left, right, top, bottom } = FRAME;
  const values = lines.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])]);
  const ends = extent(values, range || [Infinity, -Infinity]);
  /** @param {number} x */
  const across = (x) => left + ((x - span[0]) / (span[1] - span[0] || 1)) * (width - left - right);
  /** @param {number} y */
  const down = (y) => height - bottom - ((y - ends[0]) / (ends[1] - ends[0])) * (height - bottom - top);

  const plot = drawn('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', class: 'plot' });
  for (const y of ticks(ends[0], ends[1], 4)) {
    plot.append(drawn('line', { x1: left, x2: width - right, y1: down(y), y2: down(y), class: 'grid' }));
    plot.append(drawn('text', { x: left - 5, y: down(y) + 3, 'text-anchor': 'end' }, shown(y)));
  }
  for (const x of ticks(span[0], span[1], 5)) {
    plot.append(drawn('text', { x: across(x), y: height - 5, 'text-anchor': 'middle' }, shown(x)));
  }
  for (const line of lines) plot.append(...partsOf(line, across, down));
  const marker = drawn('line', { y1: top - 4, y2: height - bottom, class: 'marker' });
  plot.append(marker);

  /** @param {PointerEvent} event */
  const point = (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    onMove(span[0] + ((x - left) / (width - left - right)) * (span[1] - span[0]));
  };
  plot.onpointerdown = (event) => {
    plot.setPointerCapture(event.pointerId);
    point(event);
  };
  plot.onpointermove = (event) => event.buttons && point(event);
  const moveMarker = (/** @type {number} */ x) => {
    for (const end of ['x1', 'x2']) marker.setAttribute(end, String(across(x)));
  };
  return { plot, moveMarker };
}

/**
 * The least and the greatest of the values that are known and of two ends; never the same.
 * @param {(number | null)[]} values
 * @param {[number, number]} ends
 */
function extent(values, ends) {
  const known = /** @type {number[]} */ (values.filter((value) => value !== null));
  const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], ends);
  if (low > high) return [0, 1];
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}

/**
 * A chart with a legend and a marker. Its `moveTo` shows where each run stands.
 * @param {{title: string, note: string, range: [number, number] | null}} chart
 * @param {Drawn[]} lines
 * @param {[number, number]} span  ends of the axis along which the lines run
 * @param {(x: number) => void} onMove  told where the reader points
 */
function chartOf(chart, lines, span, onMove) {
  const draw = () =>
    plotOf(
      lines.filter((line) => !hidden.has(line.key)),
      span,
      chart.range,
      onMove,
    );
  const title = element('h3', {}, chart.title);
  const caption = element('figcaption', {}, title, element('span', { className: 'note' }, chart.note));
  const amounts = lines.map(() => element('b'));
  const buttons = lines.map((line, index) => {
    const key = drawn('svg', { viewBox: '0 0 22 8', class: 'key', 'aria-hidden': 'true' });
    key.append(drawn('path', { d: 'M0 4H22', class: classOf(line) }));
    const button = element('button', { 'aria-pressed': !hidden.has(line.key) }, key, ` ${line.name} `, amounts[index]);
    button.onclick = () => {
      if (!hidden.delete(line.key)) hidden.add(line.key);
      button.setAttribute('aria-pressed', String(!hidden.has(line.key)));
      const { plot } = current;
      current = draw();
      plot.replaceWith(current.plot);
      moveTo(place.x, place.snapshots);
    };
    return button;
  });
  const place = { x: span[0], snapshots: /** @type {number[]} */ ([]) };
  let current = draw();
  /**
   * @param {number} x
   * @param {number[]} snapshots  of each run
   */
  function moveTo(x, snapshots) {
    Object.assign(place, { x, snapshots });
    const texts = lines.map((line) => shown(line.values[snapshots[line.run]]));
    lines.forEach((line, i) => say(amounts[i], line.reference ? '' : texts[i]));
    const said = lines.map((line, i) => `${line.name} ${texts[i]}`);
    current.moveMarker(x);
    current.plot.setAttribute('aria-label', `${chart.title} at ${shown(x)}: ${said.join(', ')}`);
  }
  const legend = element('div', { className: 'legend' }, ...buttons);
  return { element: element('figure', { className: 'chart' }, caption, current.plot, legend), moveTo };
}

/** @param {Drawn} line */
function classOf(line) {
  return `line ${line.reference ? 'reference' : `colour-${line.colour % 6} run-${line.run % 3}`}`;
}

/**
 * The band of a line, the line itself and its points; what is not known leaves a gap.
 * @param {Drawn} line
 * @param {(x: number) => number} across
 * @param {(y: number) => number} down
 */
function partsOf(line, across, down) {
  /** @param {number} index @param {number | null} value */
  const at = (index, value) => `${across(line.xs[index]).toFixed(1)} ${down(value || 0).toFixed(1)}`;
  const parts = [];
  if (line.low && line.high) {
    const { low, high } = line;
    const known = low.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
    const there = known.map((i) => at(i, high[i])).concat(known.reverse().map((i) => at(i, low[i])));
    if (there.length) parts.push(drawn('path', { d: `M${there.join('L')}Z`, class: `band colour-${line.colour % 6}` }));
  }
  // Points that are far apart, as those of what is measured every fifth time, are joined too.
  const known = line.values.map((_, i) => i).filter((i) => line.values[i] !== null);
  if (known.length)
    parts.push(drawn('path', { d: `M${known.map((i) => at(i, line.values[i])).join('L')}`, class: classOf(line) }));
  if (known.length <= 60 && !line.reference) {
    for (const i of known) {
      const [cx, cy] = at(i, line.values[i]).split(' ');
      parts.push(drawn('circle', { cx, cy, r: 2, class: `dot colour-${line.colour % 6}` }));
    }
  }
  return parts;
}

/**
 * Blocks by snapshots as colours. Its `moveTo` frames a snapshot; `onPick` is told a block and a snapshot, from 0.
 * @param {string} title
 * @param {(number | null)[][]} rows  of each block, first block first
 * @param {(block: number, snapshot: number) => void} onPick
 */
function heatMap(title, rows, onPick) {
  const [low, high] = extent(rows.flat(), [Infinity, -Infinity]);
  const [width, height] = [rows[0].length, rows.length];
  const canvas = element('canvas', { width, height, tabIndex: 0, role: 'img', className: 'heat' });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
  rows.forEach((row, block) =>
    row.forEach((value, snapshot) => {
      if (value === null) return;
      context.fillStyle = `hsl(265 60% ${94 - (74 * (value - low)) / (high - low)}%)`; // the darker the more
      context.fillRect(snapshot, height - 1 - block, 1, 1); // the first block below, as the image enters there
    }),
  );
  const cell = element('div', { className: 'cell' });
  const said = element('figcaption', { className: 'note', 'aria-live': 'polite' });
  let [block, now] = [0, 0];
  const show = () => {
    said.textContent = `${title}: block ${block + 1} of ${height}: ${shown(rows[block][now])} (${shown(low)} to ${shown(high)} over all)`;
    canvas.setAttribute('aria-label', `${said.textContent}. Up and down choose a block.`);
    Object.assign(cell.style, { left: `${(now / width) * 100}%`, width: `${100 / width}%` });
    Object.assign(cell.style, { top: `${((height - 1 - block) / height) * 100}%`, height: `${100 / height}%` });
  };
  canvas.addEventListener('pointerdown', (event) => {
    const box = canvas.getBoundingClientRect();
    const snapshot = Math.floor(((event.clientX - box.left) / box.width) * width);
    block = height - 1 - Math.min(height - 1, Math.floor(((event.clientY - box.top) / box.height) * height));
    show();
    onPick(block, Math.min(width - 1, snapshot));
  });
  canvas.addEventListener('keydown', (event) => {
    const change = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!change) return;
    event.preventDefault();
    block = Math.min(height - 1, Math.max(0, block + change));
    show();
    onPick(block, now);
  });
  /** @param {number} snapshot */
  const moveTo = (snapshot) => {
    now = snapshot;
    show();
  };
  return {
    element: element(
      'figure',
      { className: 'blocks' },
      element('div', { className: 'heat-frame' }, canvas, cell),
      said,
    ),
    moveTo,
  };
}
