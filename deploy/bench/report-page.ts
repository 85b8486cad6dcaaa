/** Style and script of the report, as they go into the page. The script runs in a browser, on the object `bench` that stands before it. */
export const reportStyle = `
:root { color-scheme: light; --ink: #1b2733; --quiet: #5d6b78; --line: #e1e6eb; --paper: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: min(24px, 4vw); background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 24px; } h2 { margin: 0 0 8px; font-size: 16px; }
header p { margin: 6px 0 18px; color: var(--quiet); overflow-wrap: anywhere; }
section { margin-bottom: 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 14px; }
article, .plot, section:not(.cards, .plots) { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
article { border-top: 4px solid var(--run); }
article p, article ul { margin: 10px 0 0; color: var(--quiet); font-size: 13px; } article ul { padding-left: 18px; color: #a33d00; }
.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.figures b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; } .figures span { color: var(--quiet); font-size: 12px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 14px; } .plot { min-width: 0; overflow: hidden; }
.plot p { margin: 0 0 6px; color: var(--quiet); font-size: 13px; }
.u-legend { font-size: 12px; text-align: left; }
section:not(.cards, .plots) { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); text-align: left; font-weight: normal; } th { color: var(--quiet); font-size: 13px; }
.number { text-align: right; }
i { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 2px; }
.bars td:first-child { width: 130px; white-space: nowrap; } .bar div { display: flex; height: 16px; } .bar small { color: var(--quiet); }
.key { font-size: 13px; color: var(--quiet); } .key span { display: inline-block; width: 12px; height: 12px; margin: 0 5px 0 14px; vertical-align: -1px; } .key span:first-child { margin-left: 0; }
.compute { background: #0072b2; } .sync { background: #e69f00; } .link { background: #cc79a7; } .idle { background: #d5dbe1; }
@media (max-width: 560px) { .plots, .cards { grid-template-columns: minmax(0, 1fr); } }
`;

export const reportScript = `
const plots = document.getElementById('plots');
const { runs, percentiles } = bench;
const many = runs.length > 1;
const axis = { stroke: '#5d6b78', grid: { stroke: '#e9edf0', width: 1 }, ticks: { stroke: '#e1e6eb', width: 1 } };
const shown = (unit) => (_, value) => value == null ? '-' : (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + unit;

/** lines: {label, xs, ys, colour, dash, points}. Lines have x values of their own; uPlot wants one list for all. */
function draw(title, note, xUnit, yUnit, lines, logarithmic) {
  lines = lines.filter(({ ys }) => ys.some((y) => y != null));
  if (lines.length === 0) return;
  const box = document.createElement('div');
  box.className = 'plot';
  const head = document.createElement('h2');
  head.textContent = title + (yUnit ? ',' + yUnit : '');
  const text = document.createElement('p');
  text.textContent = note;
  box.append(head, text);
  plots.append(box);
  const size = () => ({ width: box.clientWidth - 34, height: 260 });
  const plot = new uPlot({
    ...size(),
    scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : { range: (_, low, high) => [0, (high || 1) * 1.05] } },
    axes: [
      { ...axis, values: (_, values) => values.map((value) => value + xUnit) },
      { ...axis, size: 62, values: (_, values) => values.map((value) => value == null ? '' : value >= 10000 ? value / 1000 + 'k' : String(value)) },
    ],
    series: [
      { label: xUnit.trim() === '%' ? 'percentile' : 'time', value: shown(xUnit) },
      ...lines.map(({ label, colour, dash, points }) => ({
        label, stroke: colour, fill: points ? colour : undefined, width: points ? 0 : 2, dash, value: shown(yUnit), spanGaps: false,
        ...(points ? { paths: () => null, points: { show: true, size: 6, fill: colour + 'aa', stroke: 'transparent' } } : { points: { show: false } }),
      })),
    ],
  }, uPlot.join(lines.map(({ xs, ys }) => [xs, ys])), box);
  addEventListener('resize', () => plot.setSize(size()));
}

/** Equal times of two points of a scatter would be one to uPlot. */
const apart = (xs) => { let last = -Infinity; return xs.map((x) => last = Math.max(x, last + 1e-6)); };
const named = (run, name) => many ? (name ? run.load + ', ' + name : run.load) : (name || run.load);
const curves = (key) => runs.map((run) => ({ label: named(run), colour: run.colour, xs: run.series.curves[key].length ? percentiles : [], ys: run.series.curves[key] }));
const overTime = (key, name, dash) => runs.map((run) => ({ label: named(run, name), colour: run.colour, dash, xs: run.series.seconds, ys: run.series[key] }));

draw('Output over time', 'Tokens that came, a second', ' s', '', overTime('outputTokensPerSecond'));
draw('Requests that were out', 'Sent and not yet answered to the end', ' s', '', overTime('running'));
draw('Time to first token over time', 'Each point is a request, at the time its first token came', ' s', ' ms',
  runs.map((run) => ({ label: named(run), colour: run.colour, points: true, xs: apart(run.series.firstTokens.seconds), ys: run.series.firstTokens.ttftMs })));
draw('Between tokens over time', 'Median (solid) and 99th percentile (dashed) of the gaps that ended then', ' s', ' ms',
  [...overTime('itlMsP50', 'median'), ...overTime('itlMsP99', '99th', [5, 3])]);
draw('Time to first token', 'So many of all requests were at least this fast', ' %', ' ms', curves('ttftMs'), true);
draw('Between tokens', 'So many of all gaps were at most this long', ' %', ' ms', curves('itlMs'), true);
draw('Per token of a request', 'So many of all requests took at most this time a token, by the count of tokens of the server', ' %', ' ms', curves('tpotMs'), true);
draw('End to end', 'So many of all requests were answered in at most this time', ' %', ' ms', curves('e2eMs'), true);
`;
