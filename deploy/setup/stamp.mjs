import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

/** sha256 over the contents of files and folders (recursively, names included), for "has anything changed since the last build?". */
export function contentDigest(base, places, accept = () => true) {
  const hash = createHash('sha256');
  const visit = (path) => {
    const full = join(base, path);
    if (!existsSync(full)) return;
    if (statSync(full).isDirectory()) {
      for (const name of readdirSync(full).sort()) visit(join(path, name));
    } else if (accept(path)) {
      hash.update(`${path}\0`).update(readFileSync(full)).update('\0');
    }
  };
  for (const place of places) visit(place);
  return hash.digest('hex');
}

export function stampMatches(file, digest) {
  return existsSync(file) && readFileSync(file, 'utf8') === digest;
}

export function writeStamp(file, digest) {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, digest);
}
