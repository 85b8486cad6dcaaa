/**
 * `npm test`: the same set-up as `npm start`, then lint, format, types, and every test that needs no GPU. Ends with one line `N passed, N failed`.
 * `--suite models|matrix|long|hosts` runs one of the longer suites instead; other arguments go to vitest.
 */
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { spawn } from 'node:child_process';
import { root } from './paths.mjs';
import { line, seconds } from './progress.mjs';
import { runCommand, SetupError } from './run-command.mjs';
import { setUp } from './setup.mjs';

const quickProjects = ['unit', 'kernels', 'mesh', 'integration'];

function inherit(command, args) {
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] });
    child.on('error', () => resolve(127));
    child.on('close', (code) => resolve(code ?? 1));
  });
}

/** What a check prints comes in one piece, with its outcome: checks run side by side. */
async function check(name, command, args) {
  const at = Date.now();
  const { code, output } = await runCommand(command, args, { cwd: root });
  if (output) process.stdout.write(output);
  line(`${name}: ${code === 0 ? 'passed' : `failed with exit code ${code}`} (${seconds(Date.now() - at)})`);
  return code === 0;
}

async function main() {
  const args = process.argv.slice(2);
  const suiteAt = args.indexOf('--suite');
  const suite = suiteAt >= 0 ? args.splice(suiteAt, 2)[1] : null;
  const started = Date.now();
  await setUp();
  let passed = 0;
  let failed = 0;
  const bin = (name) => join(root, 'node_modules', '.bin', name);
  if (!suite) {
    // Each is one thread, and lint takes twice as long as the others together.
    const typesAndFormat = async () => [
      await check('types', bin('tsc'), ['--noEmit', '-p', 'tsconfig.json']),
      await check('format', bin('prettier'), ['--check', '--log-level', 'warn', '.']),
    ];
    for (const ok of (await Promise.all([check('lint', bin('eslint'), ['.']), typesAndFormat()])).flat()) {
      if (ok) passed++;
      else failed++;
    }
  }
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-test-'));
  const report = join(folder, 'report.json');
  const projects = (suite ? [suite] : quickProjects).flatMap((name) => ['--project', name]);
  const code = await inherit(bin('vitest'), [
    'run',
    ...projects,
    '--reporter=default',
    '--reporter=json',
    `--outputFile.json=${report}`,
    ...args,
  ]);
  let skipped = 0;
  if (existsSync(report)) {
    const summary = JSON.parse(readFileSync(report, 'utf8'));
    passed += summary.numPassedTests;
    failed += summary.numFailedTests + summary.numFailedTestSuites * (summary.numFailedTests === 0 ? 1 : 0);
    skipped = summary.numPendingTests + (summary.numTodoTests ?? 0);
  }
  if (code !== 0 && failed === 0) failed = 1;
  rmSync(folder, { recursive: true, force: true });
  line(`npm test took ${seconds(Date.now() - started)}${skipped ? `, ${skipped} skipped` : ''}`);
  process.stdout.write(`${passed} passed, ${failed} failed\n`);
  process.exitCode = failed === 0 ? 0 : 1;
}

main().catch((error) => {
  line(`npm test failed: ${error instanceof SetupError ? error.message : error.stack}`);
  process.stdout.write('0 passed, 1 failed\n');
  process.exitCode = 1;
});
