// OpenAI's SDK for Node: chat completions, or responses.

import OpenAI from "openai";

import { CITY, EMBEDDINGS_MODEL, MODEL, PROMPTS, SYSTEM, TOOL, key, lookUp, play, url } from "./harness.mjs";

const client = (name) => new OpenAI({ baseURL: url(name), apiKey: key(name) });
const said = (name) => [{ role: "user", content: PROMPTS[name] }];

const chatTools = [{ type: "function", function: TOOL }];

const chat = {
  async plain(name) {
    const reply = await client(name).chat.completions.create({ model: MODEL, messages: said(name) });
    const [choice] = reply.choices;
    const { completion_tokens: tokens, cost } = reply.usage;
    return { text: choice.message.content, finish: choice.finish_reason, tokens, cost };
  },

  async streaming(name) {
    const options = { stream: true, stream_options: { include_usage: true } };
    const stream = await client(name).chat.completions.create({ model: MODEL, messages: said(name), ...options });
    const texts = [];
    let finish, tokens;
    for await (const chunk of stream) {
      for (const choice of chunk.choices) {
        if (choice.delta.content) texts.push(choice.delta.content);
        finish = choice.finish_reason ?? finish;
      }
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    return { text: texts.join(""), parts: texts.length, finish, tokens };
  },

  async tools(name) {
    const asking = client(name).chat.completions;
    const first = await asking.create({ model: MODEL, messages: said(name), tools: chatTools });
    const { message } = first.choices[0];
    const [call] = message.tool_calls;
    const given = JSON.parse(call.function.arguments);
    const messages = [...said(name), message, { role: "tool", tool_call_id: call.id, content: lookUp(given) }];
    const last = await asking.create({ model: MODEL, messages, tools: chatTools });
    return { called: { [call.function.name]: given }, text: last.choices[0].message.content };
  },

  async toolsStreamed(name) {
    const asked = { model: MODEL, messages: said(name), tools: chatTools };
    const message = await client(name).chat.completions.stream(asked).finalMessage();
    const [call] = message.tool_calls;
    return { called: { [call.function.name]: JSON.parse(call.function.arguments) } };
  },

  async structured(name) {
    const format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: CITY } };
    const reply = await client(name).chat.completions.parse({
      model: MODEL,
      messages: said(name),
      response_format: format,
    });
    return { parsed: JSON.parse(reply.choices[0].message.content) };
  },

  async embeddings(name) {
    const reply = await client(name).embeddings.create({ model: EMBEDDINGS_MODEL, input: ["one", "two"] });
    return { vectors: reply.data.length, dimensions: reply.data[0].embedding.length };
  },
};

const offered = [{ type: "function", strict: true, ...TOOL }];

const responses = {
  async plain(name) {
    const asked = { model: MODEL, input: PROMPTS[name], instructions: SYSTEM };
    const reply = await client(name).responses.create(asked);
    return { text: reply.output_text, finish: reply.status, tokens: reply.usage.output_tokens };
  },

  async streaming(name) {
    const stream = await client(name).responses.create({ model: MODEL, input: PROMPTS[name], stream: true });
    const texts = [];
    let finish, tokens;
    for await (const event of stream) {
      if (event.type === "response.output_text.delta") texts.push(event.delta);
      if (event.type === "response.failed") finish = "error";
      if (event.type === "response.completed") {
        finish = event.response.status;
        tokens = event.response.usage.output_tokens;
      }
    }
    return { text: texts.join(""), parts: texts.length, finish, tokens };
  },

  async tools(name) {
    const asking = client(name).responses;
    const first = await asking.create({ model: MODEL, input: said(name), tools: offered });
    const [call] = first.output.filter((item) => item.type === "function_call");
    const given = JSON.parse(call.arguments);
    const result = { type: "function_call_output", call_id: call.call_id, output: lookUp(given) };
    const input = [...said(name), ...first.output, result];
    const last = await asking.create({ model: MODEL, input, tools: offered });
    return { called: { [call.name]: given }, text: last.output_text };
  },

  async toolsStreamed(name) {
    const reply = await client(name).responses.stream({ model: MODEL, input: said(name), tools: offered }).finalResponse();
    const [call] = reply.output.filter((item) => item.type === "function_call");
    return { called: { [call.name]: JSON.parse(call.arguments) } };
  },

  async structured(name) {
    const text = { format: { type: "json_schema", name: "city", strict: true, schema: CITY } };
    const reply = await client(name).responses.parse({ model: MODEL, input: PROMPTS[name], text });
    return { parsed: JSON.parse(reply.output_text) };
  },
};

const api = process.argv[2] === "responses" ? responses : chat;
await play({
  plain: api.plain,
  streaming: api.streaming,
  tools: api.tools,
  tools_streamed: api.toolsStreamed,
  structured: api.structured,
  cap: api.plain,
  cap_streamed: api.streaming,
  cut_off: api.streaming,
  ...(api.embeddings ? { embeddings: api.embeddings } : {}),
  retry: api.plain,
});
