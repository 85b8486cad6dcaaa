/** The CUDA part of the addon: where `npm run build:cuda` leaves it, and whether it is that of these sources. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { root } from './paths.mjs';
import { contentDigest, stampMatches, writeStamp } from './stamp.mjs';

export const cudaBuild = join(root, 'build', 'cuda');
const stamp = join(cudaBuild, '.part-stamp');

/** Everything that the part is compiled from: an addon of other headers must not link it. */
const digest = () =>
  contentDigest(
    root,
    ['kernels/cuda', 'kernels/include', 'kernels/reference'],
    (path) => /\.(h|cu|cuh|cpp)$|CMakeLists\.txt$/.test(path) && !/cuda_device\w*\.(h|cpp)$|reference\/.*\.cpp$/.test(path),
  );

/** The folder to link, or null: never built, or built from other sources. */
export function builtCudaPart() {
  const there = ['kernels/libshardmesh_cuda.a', 'libcudart_static.a'].every((file) => existsSync(join(cudaBuild, file)));
  return there && stampMatches(stamp, digest()) ? cudaBuild : null;
}

export function noteCudaPart() {
  writeStamp(stamp, digest());
}
