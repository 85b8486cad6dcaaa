/** `npm start`: sets the clone up, then is `shardmesh serve` with the given options, and asks the model one question when it is ready. */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { root } from './paths.mjs';
import { line } from './progress.mjs';
import { SetupError } from './run-command.mjs';
import { setUp } from './setup.mjs';

try {
  await setUp();
  const { main } = await import(pathToFileURL(join(root, 'dist', 'deploy', 'cli', 'main.js')).href);
  await main(['serve', '--ask', 'List the planets of the solar system in order.', ...process.argv.slice(2)]);
} catch (error) {
  line(`npm start failed: ${error instanceof SetupError ? error.message : error.stack}`);
  process.exitCode = 1;
}
