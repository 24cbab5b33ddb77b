"""The options that both speed benchmarks have."""

import workload
from absl import flags

MODEL = flags.DEFINE_enum("model", "emoji", workload.MODELS, "The networks; small: SDXL's architecture, tiny.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of products, and of weights not trained.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Turns that are counted.")
TIME_LIMIT = flags.DEFINE_float("time_limit", 3600, "Seconds after which no further measurement is begun.")
OUT = flags.DEFINE_string("out", "runs/speed", "Folder for the table, as Markdown and as JSON.")
