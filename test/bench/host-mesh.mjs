/** What benchmarks over "hosts" (test/hosts/network-namespaces.ts) share. */
import { dirname } from 'node:path';
import { findNatsServer } from '../../dist/coordinator/mesh/nats-server.js';
import { findModel } from '../../dist/deploy/cli/find-model.js';
import { defaultCacheDirectory } from '../../dist/kernels/model-file/cache-directory.js';

/** Waits for something to become true, a minute at most. @param said  what the error tells besides */
export async function until(what, ready, said) {
  for (let waited = 0; !ready(); waited += 50) {
    if (waited > 60_000) throw new Error(`${what} took longer than a minute:\n${said()}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** The default model and the NATS server, for a host that is to run the coordinator. */
export async function giveCoordinatorFiles(host) {
  const model = await findModel('smollm2-135m-instruct-q4_1');
  host.give(model, model.slice(defaultCacheDirectory().length));
  host.give(dirname((await findNatsServer()).path), 'nats-server/given');
}

/** Starts workers of `coordinator` on other hosts: (host, arguments) to a process. The first start on a host enrolls it. */
export function workerStarter(coordinator) {
  const enrolled = new Set();
  return async (host, args) => {
    const { output } = enrolled.has(host) ? { output: '' } : await coordinator.answer(coordinator.shardmesh('enroll'));
    enrolled.add(host);
    const token = /--enroll (\S+)$/m.exec(output)?.[1];
    return host.shardmesh('worker', ...args, ...(token ? ['--enroll', token] : []));
  };
}
