/** Wires a coordinator together: model, broker, mesh, engine, HTTP, local workers. Decides nothing itself. */
import { randomBytes } from 'node:crypto';
import { availableParallelism } from 'node:os';
import type { Address } from '../protocol/addresses.ts';
import { openModel } from '../kernels/model-file/model-file.ts';
import { ShardmeshError } from '../protocol/errors.ts';
import { newMeshId, newPlacementId, newWorkerId, type MeshId, type PlacementId, type WorkerId } from '../protocol/ids.ts';
import { protocolVersionMax, protocolVersionMin } from '../protocol/limits.ts';
import { TraceRecorder } from '../protocol/trace.ts';
import { connectNats } from '../protocol/nats-transport.ts';
import { meshSubjects } from '../protocol/subjects.ts';
import { admitHosts } from './authority/admit-hosts.ts';
import { checkFolderIsFree } from './authority/control-socket.ts';
import { MeshAuthority } from './authority/mesh-authority.ts';
import type { CoordinatorConfig } from './config.ts';
import { ShardmeshEngine } from './engine/engine.ts';
import { createHttpServer, type HttpServer } from './http/server.ts';
import { watchDisconnects } from './mesh/broker-watch.ts';
import { startBroker, type Broker } from './mesh/broker.ts';
import { claimMesh } from './mesh/claim.ts';
import { MeshService } from './mesh/mesh-service.ts';
import { defaultMeshTimers } from './mesh/mesh.ts';
import { findNatsServer } from './mesh/nats-server.ts';
import { WeightServer } from './mesh/weight-server.ts';
import { coreShares } from './mesh/core-shares.ts';
import { WorkerProcesses } from './mesh/worker-processes.ts';
import { createLog, type Logger } from './observe/log.ts';
import { Metrics } from './observe/metrics.ts';
import { meshMetrics } from './observe/mesh-metrics.ts';
import { traceDocument } from './observe/trace-document.ts';
import { takeTrace } from './observe/trace-session.ts';
import { summarizeTrace } from './observe/trace-summary.ts';
import { planModel } from './planner/model-plan.ts';
import { createTextModel } from './text/text-model.ts';

/** For the last events of streams that were cut short by a drain. */
const writeGraceMs = 1_000;

export interface Coordinator {
  readonly url: string;
  readonly modelName: string;
  readonly tensorParallel: number;
  readonly pipelineParallel: number;
  readonly mesh: MeshService;
  readonly engine: ShardmeshEngine;
  /** Process ids of the local workers and the private broker (null without one). */
  processes(): { workers: Map<string, number>; broker: number | null };
  /** Resolves when a placement serves and a real decode has passed. `onWait` hears why not yet, whenever that changes. */
  whenReady(onWait: (reason: string) => void): Promise<void>;
  /** No new requests, running ones finish within `graceMs` or end with an error; then every process and file is gone. */
  drain(graceMs: number): Promise<void>;
}

/** Runs clean-ups in reverse order of what was started, whatever fails. */
class Cleanup {
  readonly #steps: (() => Promise<void> | void)[] = [];
  add(step: () => Promise<void> | void): void {
    this.#steps.push(step);
  }
  async run(): Promise<void> {
    for (const step of this.#steps.splice(0).reverse()) {
      try {
        await step();
      } catch {
        // What cannot be cleaned up must not keep the rest from being so.
      }
    }
  }
}

export async function startCoordinator(config: CoordinatorConfig, onFatal: (error: Error) => void): Promise<Coordinator> {
  const log = createLog({ level: config.logLevel, name: 'coordinator' });
  const cleanup = new Cleanup();
  try {
    return await start(config, log, cleanup, onFatal);
  } catch (error) {
    await cleanup.run();
    throw error;
  }
}

async function start(
  config: CoordinatorConfig,
  log: Logger,
  cleanup: Cleanup,
  onFatal: (error: Error) => void,
): Promise<Coordinator> {
  const event = (name: string, fields: Record<string, unknown>): void => log.info(fields, name);

  const { tensorParallel, pipelineParallel, bits, activations, kvType, contextTokensMax } = config;
  // The broker and the worker processes start while the model is read; workers that join before the mesh listens are asked again.
  if (config.hosts) await checkFolderIsFree(config.hosts.meshFolder);
  const authority = config.hosts && MeshAuthority.open(config.hosts.meshFolder);
  const placementId = config.broker?.placements[0] ?? authority?.placement ?? newPlacementId();
  const meshId = config.broker?.mesh ?? authority?.mesh ?? newMeshId();
  const seatCount = tensorParallel.count * pipelineParallel.count;
  const cores = config.cores ?? availableCores();
  const spin = seatCount <= cores.length;
  let mesh: MeshService | null = null;
  const local = config.broker
    ? null
    : await startLocal({
        config,
        authority,
        meshId,
        placementId,
        workerCount: config.localWorkers ?? seatCount,
        cores,
        event,
        cleanup,
        onWorkerExit: (worker, cause) => mesh?.mesh.workerGone(worker, cause, performance.now()),
      });
  const credentials = config.broker ?? local?.broker.coordinatorCredentials();
  if (!credentials) throw new ShardmeshError('config_invalid', 'no broker');

  const { file, facts } = await openModel(config.modelPath, { cacheDirectory: config.cacheDirectory });
  const plan = await planModel(facts, config.modelPath, config.cacheDirectory, {
    tensorParallel,
    pipelineParallel,
    bits,
    activations,
    kvType,
    contextTokensMax,
  });
  const text = createTextModel(file);
  if (text.templateProblem) log.warn({ problem: text.templateProblem }, 'chat_template_refused');
  const [firstSeat] = plan.seats;
  if (!firstSeat) throw new ShardmeshError('placement_impossible', 'the model has no shard');
  const context = firstSeat.program.contextTokensMax;

  const transport = await connectNats({ credentials, name: 'coordinator', patienceMs: config.broker ? 10_000 : 2_000 });
  cleanup.add(() => transport.close());
  if (config.broker) {
    // A private broker is nobody else's.
    const subject = meshSubjects(meshId).lead();
    cleanup.add(await claimMesh({ transport, subject, id: randomBytes(8).toString('hex'), onLost: onFatal }));
  }

  const { secret, tls } = credentials;
  const weights = new WeightServer(
    { secret, mesh: meshId, tls },
    {
      onSent: (sent) => event('slice_sent', sent),
      onRefused: (refused) => event('slice_refused', refused),
    },
  );
  for (const seat of plan.seats) weights.offer(seat.slice, config.modelPath);
  const weightsAddress = await weights.listen(config.hosts ? portFrom(config.hosts.address, 2) : {});
  cleanup.add(() => weights.close());

  const seatPlan = ({ stage, rank }: { stage: number; rank: number }) => {
    const seat = plan.seats.find((one) => one.stage === stage && one.rank === rank);
    if (!seat) throw new ShardmeshError('internal', `no seat ${stage}.${rank}`);
    return seat;
  };
  const recorder = new TraceRecorder();
  const service = await MeshService.start({
    transport,
    recorder,
    meshId,
    revoked: authority?.revoked() ?? [],
    onFatal,
    onBrokerSilent: () => void local?.broker.replaceIfFrozen(),
    event,
    mesh: {
      model: facts.name,
      link: config.link,
      wire: config.wire,
      bits: firstSeat.program.bits,
      seats: plan.seats.map(({ stage, rank }) => ({ stage, rank })),
      placementTemplate: {
        stages: plan.cut.stages.map((stage) => ({ ...stage, ranks: stage.ranks.map((rank) => ({ ...rank, worker: '' })) })),
      },
      protocol: { min: protocolVersionMin, max: protocolVersionMax },
      placementId,
      newLinkKey: () => randomBytes(32).toString('hex'),
      sliceSha256For: (seat) => seatPlan(seat).sliceSha256,
      timers: defaultMeshTimers,
      assignFor: (seat, { executor }) => ({
        model: JSON.stringify(facts),
        sourceSha256: facts.sourceSha256,
        sliceSha256: seatPlan(seat).sliceSha256,
        modelPath: config.modelPath,
        weightsAddress,
        executor: executor !== 'auto' ? executor : config.executor === 'reference' ? 'reference' : 'cpu',
        isa: config.isa,
        cores: [],
        spin,
        blockTokens: config.blockTokens,
        kvBlocks: 0,
        kvCacheBytes: config.kvCacheBytes,
        bits,
        activations,
        kvType,
        contextTokensMax: context,
        stepTokensMax: config.stepTokensMax,
        sequencesMax: config.sequencesMax,
      }),
    },
  });
  mesh = service;
  cleanup.add(() => service.stop());
  if (local) {
    const { broker } = local;
    transport.onEvent(({ type }) => void (type === 'disconnected' && broker.replaceIfFrozen()));
    const stopWatch = await watchDisconnects(
      broker.systemCredentials(),
      (nkey) => broker.workerOf(nkey),
      ({ worker, reason }) => service.connectionEnded(worker, reason),
    );
    cleanup.add(stopWatch);
  }
  if (local && authority && config.hosts)
    cleanup.add(
      await admitHosts({
        authority,
        folder: config.hosts.meshFolder,
        address: portFrom(config.hosts.address, 1),
        broker: local.broker,
        weights,
        service,
        log,
      }),
    );

  const engine = new ShardmeshEngine({
    text,
    transport: service,
    recorder,
    modelSha256: facts.sourceSha256,
    activations,
    kvType: `${firstSeat.program.kv.key}/${firstSeat.program.kv.value}`,
    prefixCacheSecret: config.prefixCache ? randomBytes(32) : null,
    contextTokensMax: context,
    blockTokens: config.blockTokens,
    sequencesMax: config.sequencesMax,
    stepTokensMax: config.stepTokensMax,
    prefillChunkMax: config.prefillChunkMax,
    itlTargetMs: config.itlTargetMs,
    speculation: config.speculation,
    ...(config.stepsInFlightMax === null ? {} : { stepsInFlightMax: config.stepsInFlightMax }),
    ...(log.isLevelEnabled('debug') && {
      onPlan: ({ epoch, step, sequences }, requestIds) =>
        log.debug(
          { epoch, step, tokens: sequences.reduce((sum, { tokens }) => sum + (tokens?.length ?? 1), 0), requestIds },
          'step_planned',
        ),
    }),
  });
  const metrics = new Metrics(meshMetrics(engine, service, transport));
  const modelName = config.servedModelName ?? servedName(facts.name);
  const http: HttpServer = await createHttpServer({
    engine,
    text,
    model: {
      id: modelName,
      created: Math.floor(Date.now() / 1000),
      contextTokensMax: context,
      vocabularySize: facts.vocabularySize,
    },
    host: config.http.host,
    port: config.http.port,
    apiKeys: config.http.apiKeys,
    canary: (freshMs) => engine.canary(freshMs),
    metrics,
    log,
    recorder,
    trace: async (milliseconds) => {
      const processes = await takeTrace(service, recorder, milliseconds);
      return { ...traceDocument(processes), summary: summarizeTrace(processes) };
    },
  });
  cleanup.add(() => http.close());

  return {
    url: http.url,
    modelName,
    tensorParallel: plan.cut.stages[0]?.ranks.length ?? 1,
    pipelineParallel: plan.cut.stages.length,
    mesh: service,
    engine,
    processes: () => ({ workers: local?.workers.pids() ?? new Map<string, number>(), broker: local?.broker.pid ?? null }),
    async whenReady(onWait) {
      let said = '';
      while (!(await engine.canary(30_000))) {
        const reason = service.mesh.reason() ?? 'trying one decode';
        if (reason !== said) onWait(reason);
        said = reason;
        await new Promise((resolve) => setTimeout(resolve, 25));
      }
    },
    async drain(graceMs) {
      // The engine ends what is left with a typed error; the server closes when the last answer has been written.
      const answered = http.drain(graceMs + writeGraceMs);
      await engine.drain(graceMs);
      await answered;
      await cleanup.run();
    },
  };
}

/** NATS listens on the advertised port, enrollment on the next, the weight server on the one after. */
const portFrom = ({ host, port }: Address, offset: number): Address => ({ host, port: port + offset });

interface LocalOptions {
  config: CoordinatorConfig;
  authority: MeshAuthority | null;
  meshId: MeshId;
  placementId: PlacementId;
  workerCount: number;
  cores: readonly number[];
  event: (name: string, fields: Record<string, unknown>) => void;
  cleanup: Cleanup;
  onWorkerExit: (worker: WorkerId, cause: string) => void;
}

/** A private broker, and the local worker processes. */
async function startLocal(options: LocalOptions): Promise<{ broker: Broker; workers: WorkerProcesses }> {
  const { config, authority, meshId, placementId, workerCount, cores, event, cleanup, onWorkerExit } = options;
  const ids = Array.from({ length: workerCount }, () => newWorkerId());
  const broker = await startBroker({
    server: await findNatsServer(),
    mesh: meshId,
    workers: ids,
    placements: [placementId],
    ...(authority &&
      config.hosts && {
        listener: { ...config.hosts.address, identityOf: (name) => authority.identityOf(name) },
        secret: authority.secret,
        enrolled: authority.workers.filter(({ revokedAt }) => revokedAt === null),
      }),
    onEvent: ({ type, ...fields }) => event(`broker_${type}`, fields),
  });
  cleanup.add(() => broker.stop());
  const processes = config.oneProcess && workerCount > 0 ? [ids] : ids.map((worker) => [worker]);
  const shares = coreShares(cores, processes.length);
  const workers = new WorkerProcesses({
    module: config.workerModule,
    processes: processes.map((own, index) => ({
      workers: own,
      args: [
        ...['worker', '--log-level', config.logLevel],
        ...own.flatMap((worker, i) => [i === 0 ? '--credentials' : '--also', broker.credentialsFile(worker)]),
        ...(config.hosts ? ['--advertise', config.hosts.address.host] : []),
        ...(config.executor === 'cuda' ? ['--executor', 'cuda'] : []),
        ...(shares ? ['--cores', (shares[index] ?? []).join(',')] : []),
      ],
    })),
    onExit: (worker, cause) => onWorkerExit(worker as WorkerId, cause),
    event,
  });
  workers.start();
  cleanup.add(() => workers.stop(3_000));
  return { broker, workers };
}

/** Cores that this process may run on. */
const availableCores = (): number[] => Array.from({ length: availableParallelism() }, (_, core) => core);

/** A model's own name as the API can carry it. */
function servedName(name: string): string {
  return (
    name
      .replaceAll(/[^A-Za-z0-9._-]+/g, '-')
      .replaceAll(/^-+|-+$/g, '')
      .slice(0, 96) || 'model'
  );
}
