"""What does a fake dashboard server tell? Runs of every state, curves, checkpoints, rollouts; some of it hostile."""

from __future__ import annotations

import math
import random

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>window.owned = 1</script>"
NOW = 1_795_541_000.0
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

GIB = 2**30

Json = dict[str, object]


def curve(length: int, seed: int, start: float, end: float, noise: float) -> list[float]:
    """Return values that fall from `start` towards `end`."""
    draw = random.Random(seed)
    return [end + (start - end) * math.exp(-3 * i / length) + draw.gauss(0, noise) for i in range(length)]


def run_row(run: str, name: str, state: str, now: float, **more: object) -> Json:
    """Return a row as `GET /dashboard/api/runs` has them."""
    return {
        "run": run,
        "source": "run",
        "name": name,
        "script": "rl.py",
        "model": MODEL,
        "rank": 16,
        "state": state,
        "reason": None,
        "created": now - 9000,
        "updated": now - 3,
        "ended": None,
        "step": 812,
        "loss": 1.2345678,
        "reward": None,
        "tokens": 4_812_332,
        "tokens_per_second": 1843.2,
        "wall_seconds": 8997.0,
        "disk_bytes": 91_234_567,
        "checkpoints": 3,
        "last_checkpoint": f"tinker://{run}/weights/step-800",
        "last_saved": now - 120,
        "resumed_from": None,
        "parent": None,
        "children": [],
        "pid": 4242,
        "host": "box",
        "key": None,
        "spark": curve(60, len(name), 3.0, 1.2, 0.1),
        "spark_name": "loss:mean",
        "alerts": [],
        "note": "",
        "tags": [],
        "archived": False,
        "user_metadata": {},
    } | more


def rows(now: float) -> list[Json]:
    """Return runs of every state."""
    alert = {"kind": "kl", "text": "KL of sampler and trainer is 0.031, over 0.01", "step": 796, "time": now - 200}
    return [
        run_row("s1:train:0", "math-rl-0423", "live", now, reward=0.6134, alerts=[alert], tags=["gsm8k", "ppo"]),
        run_row("s2:train:0", "sft-lighthouse", "idle", now, updated=now - 400, step=240, note="lr 5e-4 looks best"),
        run_row(
            "s3:train:0",
            HOSTILE,
            "crashed",
            now,
            updated=now - 4000,
            reason=f"process 991 was killed {HOSTILE}",
            model=HOSTILE,
            note=HOSTILE,
        ),
        run_row(
            "s4:train:0",
            "dpo-3",
            "done",
            now,
            updated=now - 9000,
            ended=now - 9000,
            step=1500,
            parent="s2:train:0",
            resumed_from="tinker://s2:train:0/weights/half",
        ),
        run_row("s5:train:0", "distil-qwen", "unloaded", now, updated=now - 20_000, step=64),
        run_row(
            "log:gsm8k",
            "gsm8k",
            "unknown",
            now,
            source="log",
            updated=now - 30_000,
            reward=0.8,
            spark=curve(40, 5, 0.1, 0.8, 0.03),
            spark_name="reward/mean",
        ),
    ]


def series(run: str, now: float, length: int = 812) -> Json:
    """Return a run's curves, events and cursor."""
    seed = sum(map(ord, run))
    steps = list(range(1, length + 1))
    columns = {"step": steps, "time": [now - 8 * (length - i) for i in steps], "tokens": [5926 * i for i in steps]}
    values = {
        "loss:mean": curve(length, seed, 3.1, 1.2, 0.12),
        "grad_norm:mean": [
            abs(v) + (90 if i == length // 2 else 0) for i, v in enumerate(curve(length, seed + 1, 9, 0.8, 0.3))
        ],
        "learning_rate:mean": [1e-4 * min(1, i / 40) for i in steps],
        "tokens_per_second:mean": curve(length, seed + 2, 700, 1843, 60),
        "kl_sample_train:mean": [abs(v) for v in curve(length, seed + 3, 0.001, 0.004, 0.001)],
        "reward/mean": curve(length, seed + 4, 0.05, 0.61, 0.05),
        "tokens:sum": [5926.0] * length,
        "padding_waste:mean": curve(length, seed + 5, 0.2, 0.05, 0.01),
        "device_seconds:sum": curve(length, seed + 6, 9, 3.2, 0.2),
        HOSTILE: curve(length, seed + 7, 1, 2, 0.1),
    }
    events = [
        {"kind": "start", "step": 0, "time": now - 8 * length, "details": {"base_model": MODEL, "rank": 16}},
        {
            "kind": "compile",
            "step": 1,
            "time": now - 8 * (length - 1),
            "details": {
                "program": "backward",
                "shapes": "8x1024",
                "seconds": 41.3,
                "cause": "first use",
                "cached": False,
            },
        },
        {
            "kind": "compile",
            "step": 300,
            "time": now - 8 * (length - 300),
            "details": {
                "program": "backward",
                "shapes": "8x1280",
                "seconds": 12.0,
                "cause": "first use",
                "cached": True,
            },
        },
        *(
            {
                "kind": "save",
                "step": s,
                "time": now - 8 * (length - s),
                "details": {"path": f"tinker://{run}/weights/step-{s}"},
            }
            for s in (200, 400, 600, 800)
        ),
    ]
    return {
        "run": run,
        "series": {name: {"kind": "step", **columns, "value": value} for name, value in values.items()},
        "names": list(values),
        "events": [each for each in events if each["step"] <= length],
        "next": f"{length}-9",
        "live": True,
    }


def device(now: float, *, compiling: bool = False) -> Json:
    """Return one engine with two sampler replicas, one of them lost."""
    event = {"program": "decode", "shapes": "32 rows", "seconds": 9.0, "cause": "first use", "cached": True}
    metrics = {
        "memory_bytes/weights": 15 * GIB,
        "memory_bytes/available": 9 * GIB,
        "sampler/rows_running": 23,
        "sampler/rows_waiting": 4,
        "sampler/occupancy:mean": 0.83,
    }
    return {
        "engines": [engine(now, compiling)],
        "hosts": [],
        "compiles": [{"run": "s1:train:0", "step": 300, "time": now - 4000, "details": event}],
        "points": {"s1:train:0": {"kind": "device", "step": 812, "time": now, "metrics": metrics}},
    }


def engine(now: float, compiling: bool) -> Json:
    """Return an engine as it describes itself, with its health."""
    running = [{"program": "backward", "shapes": "8x1024", "kind": "train", "cause": "first use", "seconds": 12.3}]
    replica = {
        "role": "sampler",
        "host": "box",
        "device": "TPU v4",
        "rows": 12,
        "sampled_tokens": 1_204_233,
        "prefix_hits": 881,
        "lost_because": "",
    }
    return {
        "model": {"name": MODEL, "path": "/models/x", "family": "llama"},
        "device": {"platform": "tpu", "kind": "TPU v4", "count": 8},
        "mesh": {"fsdp": 8, "tensor": 1},
        "hosts": [],
        "dtype": "bfloat16",
        "max_context": 8192,
        "matmul_flops_per_second": 1.9e15,
        "memory_bytes": {
            "weights": 15 * GIB,
            "adapters": GIB // 4,
            "optimizer": GIB // 2,
            "gradients": GIB // 8,
            "cache": 6 * GIB,
            "decode_weights": 0,
            "activations_per_token": 90_000,
            "available": 9 * GIB,
        },
        "sampling": {
            "rows_running": 23,
            "rows_waiting": 4,
            "occupancy": 0.83,
            "prompt_tokens": 900_000,
            "prompt_tokens_cached": 610_000,
            "sampled_tokens": 2_300_000,
        },
        "training": {
            "tokens": 4.8e6,
            "tokens_per_second": 18_432.0,
            "padding_waste": 0.06,
            "host_share": 0.02,
            "useful_flops_per_token": 4.1e9,
            "matmul_fraction": 0.412,
            "limit_fraction": 0.5,
            "host_seconds": 40.0,
            "device_seconds": 2400.0,
            "compile_seconds": 53.0,
            "queue_seconds": 210.0,
        },
        "compiled": [
            {
                "program": "backward",
                "shapes": "8x1024",
                "seconds": 41.3,
                "cause": "first use",
                "cached": False,
                "bytes": GIB,
                "ended_at": now - 6000,
            }
        ],
        "samplers": [
            replica | {"number": 0, "state": "ready"},
            replica | {"number": 1, "state": "lost", "lost_because": f"the process ended {HOSTILE}"},
        ],
        "health": {
            "state": "compiling" if compiling else "busy",
            "waiting": 2,
            "stalled_seconds": 0.0,
            "compiling": running if compiling else [],
            "hosts": [],
        },
    }


def checkpoint(run: str, name: str, kind: str, now: float, **more: object) -> Json:
    """Return a row as `GET /dashboard/api/checkpoints` has them."""
    path = f"tinker://{run}/{'sampler_weights' if kind == 'sampler' else 'weights'}/{name}"
    return {
        "path": path,
        "run": run,
        "kind": kind,
        "name": name,
        "step": 400,
        "loss": 1.4,
        "reward": None,
        "size_bytes": 28_000_000,
        "created": now - 3000,
        "expires_at": None,
        "public": False,
        "verified": None,
        "parent": None,
        "resume": f'client = service.create_training_client_from_state_with_optimizer("{path}")',
    } | more


def checkpoints(now: float) -> list[Json]:
    """Return checkpoints: verified, damaged, hostile, one resumed from another."""
    first = "tinker://s1:train:0/weights/step-400"
    return [
        checkpoint(
            "s1:train:0",
            "step-800",
            "training",
            now,
            step=800,
            loss=1.25,
            reward=0.6,
            parent=first,
            verified={"time": now - 60, "ok": True, "error": None},
        ),
        checkpoint(
            "s1:train:0",
            "step-400",
            "training",
            now,
            verified={"time": now - 600, "ok": False, "error": "adapter/a.bin: sha256 differs"},
        ),
        checkpoint("s1:train:0", "final", "sampler", now, step=812, expires_at=now + 86_400 * 3),
        checkpoint("s3:train:0", HOSTILE, "autosave", now, step=10),
    ]


def rollouts() -> Json:
    """Return groups of samples with parts of rewards; one sample is a script."""
    draw = random.Random(3)
    texts = ["The answer is 42.", HOSTILE, "Let me think. 6 times 7 is 42, so the answer is 42.", "I do not know."]
    group = [
        {
            "step": step,
            "prompt": "What is 6 times 7? " + HOSTILE,
            "samples": [
                {
                    "text": text,
                    "reward": round(draw.random(), 2),
                    "advantage": round(draw.gauss(0, 1), 2),
                    "parts": {"correct": 1.0, "format": 0.5},
                    "tokens": len(text) // 4,
                }
                for text in texts
            ],
        }
        for step in range(1, 26)
    ]
    return {"groups": group, "total": len(group)}


def sampled(body: Json) -> Json:
    """Return an answer whose words come from the request's seed."""
    draw = random.Random(str(body.get("seed")) + str(body.get("path")))
    words = [
        "The",
        " keeper",
        " counts",
        " ships",
        ",",
        " not",
        " days",
        ".",
        " <script>",
        "alert(1)",
        "</script>",
        "\n",
        " light",
        " sea",
    ]

    def token() -> Json:
        logprob = math.log(max(1e-4, draw.random()))
        others = [
            {"id": i, "text": draw.choice(words), "logprob": math.log(draw.random() + 1e-3)}
            for i in range(100, 100 + int(str(body.get("alternatives") or 0)))
        ]
        return {
            "id": draw.randrange(50_000),
            "text": draw.choice(words),
            "logprob": logprob,
            "rank": draw.randrange(5),
            "alternatives": others,
        }

    samples = [[token() for _ in range(24)] for _ in range(int(str(body.get("num_samples") or 1)))]
    return {
        "prompt": [{"id": 1, "text": "<|im_start|>", "logprob": None}, {"id": 2, "text": "user", "logprob": -0.2}],
        "samples": [
            {"tokens": tokens, "text": "".join(str(t["text"]) for t in tokens), "stop_reason": "stop"}
            for tokens in samples
        ],
        "seconds": 0.4,
    }
