#!/usr/bin/env node
/** The `shardmesh` command of a clone or an installed package: builds what is missing, then runs the CLI. */
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const cli = new URL('../dist/deploy/cli/main.js', import.meta.url);
if (!existsSync(fileURLToPath(cli))) {
  const { setUp } = await import('./setup/setup.mjs');
  await setUp({ only: 'build' });
}
const { main } = await import(cli.href);
await main(process.argv.slice(2));
