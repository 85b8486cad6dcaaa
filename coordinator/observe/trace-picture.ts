/**
 * Some steps of a trace as a picture (SVG) that needs no viewer: a lane for each thread that did something, a box for each span, the same colour for the same name.
 * Spans inside others are lower boxes. Pure.
 */
import type { TraceDocument, TraceEvent } from './trace-document.ts';

interface Span {
  name: string;
  from: number;
  to: number;
  step: number | null;
  /** How many spans of its thread it lies in. */
  depth: number;
}

interface Lane {
  title: string;
  spans: Span[];
}

const width = 1_500;
const left = 190;
const right = 20;
const top = 48;
const boxHeight = 18;
const depthHeight = 7;
const laneGap = 16;
const legendRow = 20;
const depthsMax = 3;
/** Narrower boxes have no room for a name. */
const namedFrom = 46;
const colours = [
  '#4e79a7',
  '#f28e2b',
  '#59a14f',
  '#e15759',
  '#b07aa1',
  '#edc948',
  '#76b7b2',
  '#ff9da7',
  '#9c755f',
  '#bab0ac',
  '#6b4c9a',
  '#2f9e8f',
];

/**
 * @param steps  how many steps of the middle of the trace are shown
 * @throws {RangeError} a trace without a whole step
 */
export function tracePicture({ traceEvents }: TraceDocument, steps = 2): string {
  const [from, to] = windowOf(traceEvents, steps);
  const lanes = lanesOf(traceEvents, from, to);
  const names = [...new Set(lanes.flatMap(({ spans }) => spans.map(({ name }) => name)))];
  const colourOf = new Map(names.map((name, index) => [name, colours[index % colours.length]]));
  const x = (us: number): number => left + ((us - from) / (to - from)) * (width - left - right);
  const laneHeight = boxHeight + (depthsMax - 1) * depthHeight + laneGap;
  const bottom = top + lanes.length * laneHeight;
  const parts: string[] = [];
  for (const us of ticks(to - from)) {
    const at = x(from + us).toFixed(1);
    parts.push(`<line x1="${at}" x2="${at}" y1="${top - 6}" y2="${bottom}" stroke="#ddd"/>`);
    parts.push(`<text x="${at}" y="${top - 12}" text-anchor="middle" fill="#555">${us / 1_000} ms</text>`);
  }
  lanes.forEach(({ title, spans }, index) => {
    const y = top + index * laneHeight;
    parts.push(`<text x="8" y="${y + 14}">${escaped(title)}</text>`);
    for (const span of spans) {
      const [begin, end] = [x(Math.max(span.from, from)), x(Math.min(span.to, to))];
      const boxWidth = Math.max(end - begin, 0.6);
      const boxY = y + span.depth * depthHeight;
      const what = `${span.name}${span.step === null ? '' : `, step ${span.step}`}: ${(span.to - span.from).toFixed(0)} us`;
      parts.push(
        `<rect x="${begin.toFixed(1)}" y="${boxY}" width="${boxWidth.toFixed(1)}" height="${boxHeight}" fill="${colourOf.get(span.name)}" stroke="white" stroke-width="${boxWidth > 3 ? 0.5 : 0}"><title>${escaped(what)}</title></rect>`,
      );
      if (boxWidth > namedFrom && span.depth === 0)
        parts.push(
          `<text x="${(begin + 3).toFixed(1)}" y="${boxY + 13}" fill="white" font-size="11">${escaped(span.name.slice(0, Math.floor(boxWidth / 7)))}</text>`,
        );
    }
  });
  const columns = 6;
  names.forEach((name, index) => {
    const [atX, atY] = [left + (index % columns) * 215, bottom + 10 + Math.floor(index / columns) * legendRow];
    parts.push(
      `<rect x="${atX}" y="${atY}" width="12" height="12" fill="${colourOf.get(name)}"/><text x="${atX + 18}" y="${atY + 11}">${escaped(name)}</text>`,
    );
  });
  const height = bottom + 20 + Math.ceil(names.length / columns) * legendRow;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>\n${parts.join('\n')}\n</svg>\n`;
}

/** From the publishing of one plan's result to that of `steps` later: whole rounds, in the middle of what was recorded. */
function windowOf(events: readonly TraceEvent[], steps: number): [from: number, to: number] {
  const results = events
    .filter(({ ph, name }) => ph === 'X' && name === 'publish result')
    .map(({ ts = 0 }) => ts)
    .sort((a, b) => a - b);
  if (results.length < 2) throw new RangeError('the trace holds no whole step: record longer, or while something is asked for');
  const first = Math.max(0, Math.min(results.length - 1 - steps, Math.floor((results.length - steps) / 2)));
  return [results[first] ?? 0, results[Math.min(results.length - 1, first + steps)] ?? 0];
}

function lanesOf(events: readonly TraceEvent[], from: number, to: number): Lane[] {
  const processes = new Map<number, string>();
  const lanes = new Map<string, Lane>();
  for (const { ph, name, pid, tid, args, ts = 0, dur = 0 } of events) {
    const label = typeof args?.['name'] === 'string' ? args['name'] : '';
    if (ph === 'M' && name === 'process_name') processes.set(pid, label);
    if (ph === 'M' && name === 'thread_name')
      lanes.set(`${pid}.${tid}`, { title: `${processes.get(pid) ?? pid}, ${label}`, spans: [] });
    if (ph !== 'X' || ts > to || ts + dur < from) continue;
    const step = typeof args?.['step'] === 'number' ? args['step'] : null;
    lanes.get(`${pid}.${tid}`)?.spans.push({ name, from: ts, to: ts + dur, step, depth: 0 });
  }
  const busy = [...lanes.values()].filter(({ spans }) => spans.length > 0);
  for (const { spans } of busy) {
    // Outer spans first, so that inner ones are drawn over them.
    spans.sort((a, b) => a.from - b.from || b.to - a.to);
    const open: Span[] = [];
    for (const span of spans) {
      while (open.length > 0 && open[open.length - 1]!.to <= span.from) open.pop();
      span.depth = Math.min(open.length, depthsMax - 1);
      open.push(span);
    }
  }
  return busy;
}

/** About ten round numbers of microseconds. */
function ticks(span: number): number[] {
  const rough = span / 10;
  const power = 10 ** Math.floor(Math.log10(rough));
  const every = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  return Array.from({ length: Math.floor(span / every) + 1 }, (_, index) => index * every);
}

const escaped = (text: string): string => text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/"/g, '&quot;');
