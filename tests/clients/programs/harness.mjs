// What the Node programs share: see harness.py.

export const { MODEL, EMBEDDINGS_MODEL } = process.env;
export const PROMPTS = JSON.parse(process.env.PROMPTS);
export const SYSTEM = "Be brief.";
export const TOOL = {
  name: "look_up",
  description: "Look a thing up by its number.",
  parameters: {
    type: "object",
    properties: { id: { type: "integer", description: "Its number." } },
    required: ["id"],
    additionalProperties: false,
  },
};
export const CITY = {
  type: "object",
  properties: {
    name: { type: "string" },
    population: { type: "integer" },
    districts: { type: "array", items: { type: "string" } },
  },
  required: ["name", "population", "districts"],
  additionalProperties: false,
};

export const lookUp = ({ id }) => `thing ${id}`;
export const url = (scenario, version = "/v1") => `${process.env.GATEWAY}/${scenario}${version}`;
export const key = (scenario) => (scenario.startsWith("cap") ? process.env.POOR_KEY : process.env.GATEWAY_KEY);

/** Run each scenario and print what it returns, or how it failed. */
export async function play(scenarios) {
  const wanted = (process.env.SCENARIOS ?? "").split(" ").filter(Boolean);
  for (const [name, scenario] of Object.entries(scenarios)) {
    if (wanted.length > 0 && !wanted.includes(name)) continue;
    let seen;
    try {
      seen = await scenario(name);
    } catch (error) {
      if (process.env.VERBOSE) console.error(error);
      seen = failure(error);
    }
    process.stdout.write(JSON.stringify({ scenario: name, ...seen }) + "\n");
  }
}

export function failure(error) {
  const kind = error?.name && error.name !== "Error" ? error.name : error?.constructor?.name ?? typeof error;
  return { error: kind, status: error?.status ?? error?.statusCode ?? null, message: String(error?.message ?? error) };
}
