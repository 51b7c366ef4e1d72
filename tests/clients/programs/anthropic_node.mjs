// Anthropic's SDK for Node.

import Anthropic from "@anthropic-ai/sdk";

import { CITY, MODEL, PROMPTS, SYSTEM, TOOL, key, lookUp, play, url } from "./harness.mjs";

const client = (name) => new Anthropic({ baseURL: url(name, ""), apiKey: key(name) });
const said = (name) => [{ role: "user", content: PROMPTS[name] }];
const asked = { model: MODEL, max_tokens: 500 };
const tools = [{ name: TOOL.name, description: TOOL.description, input_schema: TOOL.parameters }];
const textOf = (message) => message.content.flatMap((block) => (block.type === "text" ? [block.text] : [])).join("");

async function plain(name) {
  const reply = await client(name).messages.create({ ...asked, system: SYSTEM, messages: said(name) });
  return { text: textOf(reply), finish: reply.stop_reason, tokens: reply.usage.output_tokens };
}

async function streaming(name) {
  const stream = client(name).messages.stream({ ...asked, messages: said(name) });
  const texts = [];
  stream.on("text", (text) => texts.push(text));
  const reply = await stream.finalMessage();
  return {
    text: texts.join(""),
    parts: texts.length,
    finish: reply.stop_reason,
    tokens: reply.usage.output_tokens,
  };
}

async function useTools(name) {
  const asking = client(name).messages;
  const first = await asking.create({ ...asked, messages: said(name), tools });
  const [call] = first.content.filter((block) => block.type === "tool_use");
  const result = { type: "tool_result", tool_use_id: call.id, content: lookUp(call.input) };
  const messages = [
    ...said(name),
    { role: "assistant", content: first.content },
    { role: "user", content: [result] },
  ];
  const last = await asking.create({ ...asked, messages, tools });
  return { called: { [call.name]: call.input }, text: textOf(last) };
}

async function useToolsStreamed(name) {
  const reply = await client(name).messages.stream({ ...asked, messages: said(name), tools }).finalMessage();
  const [call] = reply.content.filter((block) => block.type === "tool_use");
  return { called: { [call.name]: call.input } };
}

async function structured(name) {
  const format = { type: "json_schema", schema: CITY };
  const reply = await client(name).messages.create({ ...asked, messages: said(name), output_config: { format } });
  return { parsed: JSON.parse(textOf(reply)) };
}

await play({
  plain,
  streaming,
  tools: useTools,
  tools_streamed: useToolsStreamed,
  structured,
  cap: plain,
  cap_streamed: streaming,
  cut_off: streaming,
  retry: plain,
});
