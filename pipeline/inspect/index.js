'use strict';
// Shows the rollouts of a verdict whose mean of a figure is at least so much, the largest first.
const form = document.querySelector('form'), body = document.querySelector('tbody');
const rows = [...body.rows].map(row => ({row, verdict: row.dataset.verdict, means: JSON.parse(row.dataset.means)}));

function show() {
  const {verdict, figure, least} = Object.fromEntries(new FormData(form));
  const mean = each => each.means[figure] ?? -Infinity;
  const found = rows.filter(each => (!verdict || each.verdict === verdict) && (least === '' || mean(each) >= +least));
  body.replaceChildren(...found.sort((a, b) => mean(b) - mean(a)).map(each => each.row));
  form.querySelector('output').textContent = `${found.length} of ${rows.length} rollouts`;
}

form.addEventListener('input', show);
form.addEventListener('submit', event => event.preventDefault());
addEventListener('pageshow', show);
