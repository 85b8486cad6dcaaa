import { describe, expect, test } from 'vitest';
import { ProtocolError } from '../../../protocol/errors.ts';
import type { MeshId, PlacementId, WorkerId } from '../../../protocol/ids.ts';
import { inboxPrefix, meshSubjects, sourceOf } from '../../../protocol/subjects.ts';

const mesh = 'mmmmmmmmmmmmmmmmmmmmmmmmmm' as MeshId;
const a = 'aaaaaaaaaaaaaaaaaaaaaaaaaa' as WorkerId;
const b = 'bbbbbbbbbbbbbbbbbbbbbbbbbe' as WorkerId;
const placement = 'ccccccccccccccccccccccccci' as PlacementId;
const subjects = meshSubjects(mesh);

describe('subjects', () => {
  test('subjects - are those of the table', () => {
    expect(subjects.heartbeat(a)).toBe(`mesh.${mesh}.hb.${a}`);
    expect(subjects.register(a)).toBe(`mesh.${mesh}.reg.${a}`);
    expect(subjects.result(a)).toBe(`mesh.${mesh}.out.${a}.result`);
    expect(subjects.event(a)).toBe(`mesh.${mesh}.out.${a}.event`);
    expect(subjects.control(a)).toBe(`mesh.${mesh}.in.${a}.control`);
    expect(subjects.plan(placement)).toBe(`mesh.${mesh}.plan.${placement}`);
    expect(subjects.epoch()).toBe(`mesh.${mesh}.epoch`);
    expect(subjects.activation(a, b)).toBe(`mesh.${mesh}.act.${a}.${b}`);
    expect(inboxPrefix(a)).toBe(`_INBOX_${a}`);
  });

  test('subjects - grant a worker what it needs under its own id, and nothing else', () => {
    expect(subjects.workerPermissions(a, [placement])).toEqual({
      publish: [`mesh.${mesh}.hb.${a}`, `mesh.${mesh}.out.${a}.>`, `mesh.${mesh}.reg.${a}`, `mesh.${mesh}.act.*.${a}`],
      subscribe: [
        `mesh.${mesh}.in.${a}.>`,
        `mesh.${mesh}.plan.${placement}`,
        `mesh.${mesh}.act.${a}.*`,
        `_INBOX_${a}.>`,
        `mesh.${mesh}.epoch`,
      ],
    });
  });

  test.each(['*', '>', 'a.b', '', 'worker 1'])('subjects - do not take %j for an id', (text) => {
    expect(() => subjects.heartbeat(text as WorkerId)).toThrow(ProtocolError);
    expect(() => subjects.activation(a, text as WorkerId)).toThrow(ProtocolError);
    expect(() => subjects.plan(text as PlacementId)).toThrow(ProtocolError);
    expect(() => meshSubjects(text as MeshId)).toThrow(ProtocolError);
    expect(() => inboxPrefix(text as WorkerId)).toThrow(ProtocolError);
  });

  test('subjects - name the sender of what a worker publishes', () => {
    expect(sourceOf(subjects.heartbeat(a))).toBe(a);
    expect(sourceOf(subjects.register(a))).toBe(a);
    expect(sourceOf(subjects.result(a))).toBe(a);
    expect(sourceOf(subjects.activation(a, b))).toBe(b);
    expect(sourceOf(subjects.plan(placement))).toBeNull();
    expect(sourceOf(subjects.control(a))).toBeNull();
    expect(sourceOf('other.x.hb.y')).toBeNull();
  });
});
