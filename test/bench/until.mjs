/** Waits for something to become true, a minute at most. @param said  what the error tells besides */
export async function until(what, ready, said) {
  for (let waited = 0; !ready(); waited += 50) {
    if (waited > 60_000) throw new Error(`${what} took longer than a minute:\n${said()}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
