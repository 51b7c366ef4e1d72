// Vercel's AI SDK over responses, chat completions or Anthropic's messages.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { Output, embedMany, generateText, isStepCount, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { EMBEDDINGS_MODEL, MODEL, PROMPTS, TOOL, failure, key, lookUp, play, url } from "./harness.mjs";

const mode = process.argv[2];
const City = z.object({ name: z.string(), population: z.int(), districts: z.array(z.string()) });
const tools = {
  [TOOL.name]: tool({
    description: TOOL.description,
    inputSchema: z.object({ id: z.int() }),
    execute: async (input) => lookUp(input),
  }),
};
const steps = (isStepCount ?? stepCountIs)(3);

function provider(name) {
  const options = { baseURL: url(name), apiKey: key(name) };
  return mode === "anthropic" ? createAnthropic(options) : createOpenAI(options);
}

function model(name) {
  const made = provider(name);
  return mode === "chat" ? made.chat(MODEL) : made(MODEL);
}

async function plain(name) {
  const { text, finishReason, usage } = await generateText({ model: model(name), prompt: PROMPTS[name] });
  return { text, finish: finishReason, tokens: usage.outputTokens };
}

/** A retry of this SDK is not known as one: with a key of its own, the call is made once all the same. */
async function retried(name) {
  const headers = { "Idempotency-Key": crypto.randomUUID() };
  const { text } = await generateText({ model: model(name), prompt: PROMPTS[name], headers });
  return { text };
}

async function streaming(name) {
  let failed;
  const stream = streamText({ model: model(name), prompt: PROMPTS[name], onError: ({ error }) => (failed ??= error) });
  const texts = [];
  for await (const part of stream.textStream) texts.push(part);
  if (failed) return failure(failed);
  const [finish, usage] = [await stream.finishReason, await stream.usage];
  return { text: texts.join(""), parts: texts.length, finish, tokens: usage.outputTokens };
}

async function useTools(name) {
  const { text, steps: taken } = await generateText({ model: model(name), prompt: PROMPTS[name], tools, stopWhen: steps });
  const [call] = taken.flatMap((step) => step.toolCalls);
  return { called: { [call.toolName]: call.input }, text };
}

async function useToolsStreamed(name) {
  const stream = streamText({ model: model(name), prompt: PROMPTS[name], tools, stopWhen: steps });
  await stream.consumeStream();
  const [call] = (await stream.steps).flatMap((step) => step.toolCalls);
  return { called: { [call.toolName]: call.input } };
}

async function structured(name) {
  const output = Output.object({ schema: City });
  const reply = await generateText({ model: model(name), prompt: PROMPTS[name], output });
  return { parsed: reply.output };
}

async function embeddings(name) {
  const made = provider(name);
  const reply = await embedMany({ model: made.embeddingModel(EMBEDDINGS_MODEL), values: ["one", "two"] });
  return { vectors: reply.embeddings.length, dimensions: reply.embeddings[0].length };
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
  ...(mode === "chat" ? { embeddings } : {}),
  retry: retried,
});
