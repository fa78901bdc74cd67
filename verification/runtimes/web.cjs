// onnxruntime-web under node, on WebAssembly: what runs in a browser. See __init__.py for the protocol.
"use strict";
const fs = require("fs");
const path = require("path");
const readline = require("readline");

// The types of safetensors, of onnxruntime, and the arrays of JavaScript that hold them.
const TYPES = [
  ["F32", "float32", Float32Array],
  ["F64", "float64", Float64Array],
  ["F16", "float16", Uint16Array],
  ["BOOL", "bool", Uint8Array],
  ["I8", "int8", Int8Array],
  ["U8", "uint8", Uint8Array],
  ["I16", "int16", Int16Array],
  ["U16", "uint16", Uint16Array],
  ["I32", "int32", Int32Array],
  ["I64", "int64", BigInt64Array],
];

const folder = process.argv[2];

function tell(name, facts) {
  const part = path.join(folder, `${name}.part`);
  fs.writeFileSync(part, JSON.stringify(facts));
  fs.renameSync(part, path.join(folder, `${name}.json`));
}

function said(error) {
  return String((error && error.message) || error).replace(/\s+/g, " ").trim();
}

function read(file, ort) {
  const bytes = fs.readFileSync(file);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const found = {};
  for (const [name, told] of Object.entries(JSON.parse(bytes.toString("utf8", 8, start)))) {
    if (name === "__metadata__") continue;
    const [, type, Kind] = TYPES.find(([stored]) => stored === told.dtype);
    const data = new Uint8Array(bytes.subarray(start + told.data_offsets[0], start + told.data_offsets[1])).buffer;
    found[name] = new ort.Tensor(type, new Kind(data), told.shape);
  }
  return found;
}

function write(file, tensors) {
  const header = {};
  const parts = [];
  let end = 0;
  for (const [name, tensor] of tensors) {
    const [dtype] = TYPES.find(([, type]) => type === tensor.type);
    parts.push(Buffer.from(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength));
    header[name] = { dtype, shape: tensor.dims, data_offsets: [end, end + tensor.data.byteLength] };
    end += tensor.data.byteLength;
  }
  const told = Buffer.from(JSON.stringify(header), "utf8");
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(told.length));
  fs.writeFileSync(file, Buffer.concat([length, told, ...parts]));
}

async function main() {
  const job = JSON.parse(fs.readFileSync(path.join(folder, "job.json"), "utf8"));
  let ort;
  try {
    ort = require(require.resolve("onnxruntime-web", { paths: [process.cwd()] }));
  } catch (error) {
    return tell("loaded", { missing: "onnxruntime-web", reason: said(error).split(" Require stack")[0] });
  }
  let session;
  try {
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    const beside = path.dirname(job.file);
    session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(job.file)), {
      executionProviders: ["wasm"],
      graphOptimizationLevel: "all",
      logSeverityLevel: 3,
      externalData: job.data.map((name) => ({ path: name, data: new Uint8Array(fs.readFileSync(path.join(beside, name))) })),
    });
  } catch (error) {
    return tell("loaded", { refused: said(error) });
  }
  tell("loaded", { version: ort.env.versions.web, precision: "f32", inputs: [], outputs: [] });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const number = line.trim();
    try {
      const found = await session.run(read(path.join(folder, `${number}.in`), ort), job.outputs);
      write(path.join(folder, `${number}.out`), job.outputs.map((name) => [name, found[name]]));
      tell(number, {});
    } catch (error) {
      tell(number, { failed: said(error) });
    }
  }
}

main();
