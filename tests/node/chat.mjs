// What users of OpenAI's Node package write, against the server at the URL given: prints, as one
// JSON object, what came of it. Knows nothing of Penstock.
//
//     node chat.mjs URL < what.json     {asked, tools, schema}

import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { asked, tools, schema } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const said = {};

const whole = await client.chat.completions.create(asked);
said.whole = whole;

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
said.streamed = streamed;

const stream = client.chat.completions.stream({
  ...asked,
  n: 2,
  stream_options: { include_usage: true },
});
said.events = 0;
stream.on("content", () => (said.events += 1));
said.final = await stream.finalChatCompletion();

const called = client.chat.completions.stream({
  ...asked,
  max_tokens: 120,
  tools,
  tool_choice: "required",
});
said.calls = (await called.finalChatCompletion()).choices[0].message.tool_calls;

const parsed = await client.chat.completions.parse({
  ...asked,
  max_tokens: 80,
  response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema } },
});
said.parsed = parsed.choices[0].message.parsed;

said.models = (await client.models.list()).data.map((model) => model.id);
said.stored = await client.chat.completions.retrieve(whole.id);

try {
  await client.chat.completions.create({ ...asked, temperature: 9 });
} catch (error) {
  const { status, code, param, type } = error;
  said.refused = { name: error.constructor.name, status, code, param, type };
}
try {
  await client.chat.completions.create({ ...asked, model: "gpt-9" });
} catch (error) {
  said.unknown = { name: error.constructor.name, status: error.status, code: error.code };
}

console.log(JSON.stringify(said));
