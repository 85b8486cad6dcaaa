import { defineConfig } from 'vitest/config';

/** Each project is one kind of test with a limit of its own: those that build what they load may take minutes of compiling. `npm test` runs all but `models`, `matrix`, `long` and `hosts`. See ARCHITECTURE.md, "Tests". */
const project = (name: string, include: string[], testTimeout: number) => ({
  test: { name, include, testTimeout, hookTimeout: testTimeout, exclude: ['dist/**', 'node_modules/**'], pool: 'forks' as const },
});

export default defineConfig({
  test: {
    maxWorkers: 2,
    projects: [
      project('unit', ['test/unit/**/*.test.ts', 'test/conformance/**/*.test.ts'], 20_000),
      project('kernels', ['test/kernels/**/*.test.ts'], 300_000),
      project('mesh', ['test/mesh/**/*.test.ts'], 240_000),
      project('integration', ['test/integration/**/*.test.ts'], 400_000),
      project('models', ['test/models/**/*.test.ts'], 1_200_000),
      project('matrix', ['test/matrix/**/*.test.ts'], 3_600_000),
      project('long', ['test/long/**/*.test.ts'], 1_200_000),
      project('hosts', ['test/hosts/**/*.test.ts'], 300_000),
      project('gpu', ['test/gpu/**/*.test.ts'], 600_000),
    ],
  },
});
