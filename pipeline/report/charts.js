'use strict';
// Draws each <div class="chart"> from the JSON beside it: panels side by side as far as they fit,
// again when the width changes. Expressions are interpreted, so the page needs no unsafe-eval.
const LABELS = 60, GAP = 24, LEAST = 250;
const text = 'var(--ink)', faint = 'var(--faint)', line = 'var(--grid)';
const config = {
  aria: false, background: 'transparent', padding: {left: 0, right: 8, top: 4, bottom: 6},
  font: 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif', view: {stroke: null},
  title: {color: text, fontSize: 13, fontWeight: 600, anchor: 'start', frame: 'bounds', offset: 6},
  axis: {labelColor: text, titleColor: faint, titleFontWeight: 400, labelFontSize: 11,
    titleFontSize: 11, gridColor: line, domainColor: faint, tickColor: faint, labelOverlap: 'greedy'},
  axisY: {minExtent: LABELS - 8, maxExtent: LABELS - 8, labelLimit: LABELS - 12, domain: false, ticks: false},
  axisX: {grid: false},
  legend: {labelColor: text, orient: 'top', labelFontSize: 12, symbolStrokeWidth: 3, labelLimit: 280},
};

function unpacked({names, rows}) {
  return rows.map(row => Object.fromEntries(names.map((name, place) => [name, row[place]])));
}

function fitted(spec, width) {
  const columns = Math.max(1, Math.min(spec.concat.length, Math.floor((width + GAP) / (LABELS + LEAST + GAP))));
  const each = Math.floor((width - 8 - GAP * (columns - 1)) / columns) - LABELS;
  const datasets = Object.fromEntries(Object.entries(spec.datasets).map(([name, rows]) => [name, unpacked(rows)]));
  const title = {...config.title, limit: each + LABELS};
  const legend = {...config.legend, columns: Math.max(1, Math.floor(width / 170))};
  return {...spec, datasets, columns, spacing: GAP, config: {...config, title, legend},
    concat: spec.concat.map(panel => ({...panel, width: Math.max(60, each)}))};
}

async function draw(chart) {
  const width = chart.clientWidth, spec = JSON.parse(chart.previousElementSibling.textContent);
  if (!width || Math.abs(width - (chart.drawnAt ?? 0)) < 8) return;
  chart.drawnAt = width;
  chart.view?.finalize();
  const options = {mode: 'vega-lite', renderer: 'svg', ast: true, actions: false, defaultStyle: false};
  chart.view = await vegaEmbed(chart, fitted(spec, width), options);
  const svg = chart.querySelector('svg');
  for (const part of svg.children) part.setAttribute('aria-hidden', 'true');
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', chart.dataset.label);
}

let queue = Promise.resolve();
const sizes = new ResizeObserver(entries => {
  setTimeout(() => {
    for (const {target} of entries) queue = queue.then(() => draw(target)).catch(console.error);
  });
});
document.querySelectorAll('.chart').forEach(chart => sizes.observe(chart));

const reload = document.querySelector('.reload input');
if (reload) setInterval(() => reload.checked && !document.hidden && location.reload(), 1000 * reload.value);
