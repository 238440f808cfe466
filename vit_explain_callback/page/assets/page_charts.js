'use strict';
// The runs' curves, blocks and scalars, each with its controls.

let charts = /** @type {ReturnType<typeof chartOf>[]} */ ([]);
let heatMaps = /** @type {ReturnType<typeof heatMap>[]} */ ([]);
let scalarChart = /** @type {{tag: string, chart: ReturnType<typeof chartOf>} | null} */ (null);

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
  return chartOf(
    chart,
    linesOfRuns(chart.title, linesOf),
    [positions[0], positions[positions.length - 1]],
    moveToPlace,
  );
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
    heatMap(several ? `${each.name}, ${name}` : name, each.blocks[name], (_, snapshot) =>
      moveToPlace(places[r][snapshot]),
    ),
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
  const linesOf = (/** @type {Run} */ each) => each.scalars[tag] && [{ name: 'value', values: each.scalars[tag] }];
  const chart = chartOfRuns({ title: tag, note: '', range: null }, linesOf);
  part('scalar', 'div').replaceChildren(chart.element);
  chart.moveTo(positions[state.position], snapshots);
  scalarChart = { tag, chart };
}
