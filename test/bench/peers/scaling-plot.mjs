/** Output tokens a second over the number of streams, a line for each program: the best of its rounds, with a bar down to the worst. */

const [width, height, left, right, bottom, top] = [760, 440, 64, 190, 50, 44];
const colours = ['#d62728', '#ff7f0e', '#1f77b4', '#17becf', '#7f7f7f', '#bcbd22'];

/**
 * @param series  [{ name, points: [{ streams, best, worst }] }], a first line first in the legend
 * @returns an SVG
 */
export function scalingPlot(title, series) {
  const counts = [...new Set(series.flatMap(({ points }) => points.map(({ streams }) => streams)))].sort((a, b) => a - b);
  const most = Math.max(...series.flatMap(({ points }) => points.map(({ best }) => best)));
  const unit = 10 ** Math.floor(Math.log10(most));
  const every = [0.1, 0.2, 0.5, 1].map((part) => part * unit).find((one) => most / one <= 8) ?? unit;
  const highest = Math.ceil(most / every) * every;
  const [first, last] = [Math.log2(counts[0]), Math.log2(counts.at(-1))];
  const x = (streams) => left + ((Math.log2(streams) - first) / Math.max(last - first, 1)) * (width - left - right);
  const y = (value) => height - bottom - (value / highest) * (height - bottom - top);
  const parts = [];
  for (let value = 0; value <= highest + every / 2; value += every)
    parts.push(
      `<line x1="${left}" x2="${width - right}" y1="${y(value)}" y2="${y(value)}" stroke="#ddd"/><text x="${left - 8}" y="${y(value) + 4}" text-anchor="end">${Math.round(value)}</text>`,
    );
  for (const count of counts)
    parts.push(`<text x="${x(count)}" y="${height - bottom + 20}" text-anchor="middle">${count}</text>`);
  series.forEach(({ name, points }, index) => {
    const colour = colours[index % colours.length];
    const path = points.map(({ streams, best }) => `${x(streams).toFixed(1)},${y(best).toFixed(1)}`).join(' ');
    parts.push(`<polyline fill="none" stroke="${colour}" stroke-width="2" points="${path}"/>`);
    for (const { streams, best, worst } of points)
      parts.push(
        `<line x1="${x(streams).toFixed(1)}" x2="${x(streams).toFixed(1)}" y1="${y(best).toFixed(1)}" y2="${y(worst).toFixed(1)}" stroke="${colour}"/><circle cx="${x(streams).toFixed(1)}" cy="${y(best).toFixed(1)}" r="3.5" fill="${colour}"/>`,
      );
    const atY = top + 10 + index * 20;
    parts.push(
      `<rect x="${width - right + 20}" y="${atY - 10}" width="12" height="12" fill="${colour}"/><text x="${width - right + 38}" y="${atY}">${name}</text>`,
    );
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>
<text x="${left}" y="24" font-size="14">${title}</text><text x="${(left + width - right) / 2}" y="${height - 10}" text-anchor="middle">streams</text>
${parts.join('\n')}
</svg>\n`;
}
