// Questions of the pages to the server.

/** The answer to an address. Throws an Error, in words, where there is none or it is a refusal. */
export async function ask(address) {
  let response;
  try {
    response = await fetch(address);
  } catch {
    throw new Error("nightslide view did not answer: reload this page, or start the command again");
  }
  if (response.ok) return response;
  throw new Error(response.status === 409 ? (await response.json()).problem : `${address}: ${response.status}`);
}
