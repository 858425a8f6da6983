# %% [markdown]
# # Serve the SDK: a recipe of the tinker-cookbook on this machine
#
# A program that was written for the hosted service needs two variables and no change: `TINKER_BASE_URL` and
# `TINKER_API_KEY`. This notebook starts a server, lets the unmodified SDK train on it from another process, and looks
# at what the server recorded. Two minutes on two cores.

# %%
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from jax_client.weights.read.source import resolve
from jax_client.weights.read.tokenizer import load_tokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = int(os.environ.get("STEPS", "5"))

# %% [markdown]
# ## Start
#
# In a terminal this is `jax_client serve --model HuggingFaceTB/SmolLM2-135M-Instruct`. The line that begins with
# `ready:` has the address, and the page of the dashboard is at that address.

# %%
state = tempfile.mkdtemp()
command = [sys.executable, "-c", "import sys; from jax_client.cli import main; sys.exit(main())"]
server = subprocess.Popen(
    [*command, "serve", "--model", MODEL, "--port", "0", "--state-dir", state],
    stderr=subprocess.PIPE, text=True,
)  # fmt: skip
for line in server.stderr:
    print(line, end="")
    if found := re.search(r"TINKER_BASE_URL=(\S+) TINKER_API_KEY=(\S+)", line):
        break
address, key = found.groups()

# %% [markdown]
# ## A program for the SDK
#
# It imports `tinker` and nothing of this package. A recipe of the cookbook runs the same way, for example `python -m
# tinker_cookbook.recipes.chat_sl.train model_name=HuggingFaceTB/SmolLM2-135M-Instruct`.
#
# The SDK asks the Hugging Face Hub for the model's tokenizer. Where that cannot be reached, a folder of the model's
# name in the program's directory does, as below.

# %%
directory = Path(tempfile.mkdtemp())
load_tokenizer(resolve(MODEL)).save_pretrained(directory / MODEL)

PROGRAM = """
import sys
import tinker
from tinker import types

service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model=sys.argv[1], rank=8)
tokenizer = client.get_tokenizer()
tokens = tokenizer.encode("The lamp is lit at dusk, and the keeper sleeps by day.")
inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
for _ in range(int(sys.argv[2])):
    forward_backward = client.forward_backward([datum], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    print(f"loss {forward_backward.result().metrics['loss:sum']:.1f}", flush=True)
sampler = client.save_weights_and_get_sampling_client()
prompt = types.ModelInput.from_ints(tokenizer.encode("The lamp is"))
answer = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=12, temperature=0.0)).result()
print(repr(tokenizer.decode(answer.sequences[0].tokens)))
"""
environment = os.environ | {"TINKER_BASE_URL": address, "TINKER_API_KEY": key, "NO_PROXY": "127.0.0.1"}
environment["TINKER_TELEMETRY"] = "0"
program = [sys.executable, "-c", PROGRAM, MODEL, str(STEPS)]
done = subprocess.run(program, env=environment, capture_output=True, text=True, cwd=directory)
print(done.stdout or done.stderr)

# %% [markdown]
# ## What the server recorded
#
# The dashboard draws it; it is JSON for programs, too.


# %%
def get(path):
    request = urllib.request.Request(f"{address}/api/v1/{path}", headers={"X-API-Key": key})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as answer:
        return json.load(answer)


(run,) = get("metrics/runs")["runs"]
points = get(f"metrics/runs/{run['run']}?points=100")["points"]
for point in points:
    if point["kind"] == "step":
        metrics = point["metrics"]
        print(f"step {point['step']}: loss {metrics['loss:sum']:.1f}, gradient norm {metrics['grad_norm:mean']:.1f}")

# %% [markdown]
# ## Stop
#
# SIGTERM or Ctrl-C: the server finishes the step that is running, saves what was trained, and prints how to resume.

# %%
server.terminate()
print(server.communicate(timeout=120)[1])
assert done.returncode == 0 and server.returncode == 143, (done.returncode, server.returncode)
