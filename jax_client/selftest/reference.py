"""What should the toy compute? The model, its adapter's gradients and AdamW again, in plain numpy and float64.

Nothing here is shared with the programs that are checked: sequences are computed one by one, attention holds all its
scores, and the backward pass follows the formulas of `models.parts.block.layer_forward` line by line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from jax_client.engine.core.requests import AdamSettings
from jax_client.models.config import ModelConfig
from jax_client.selftest.toy import pair_of
from jax_client.values import TrainExample

ALPHA = 32.0  # of every adapter, as the API has it
Pair = tuple[np.ndarray, np.ndarray]
Gradients = dict[str, np.ndarray]


def linear(x_TI: np.ndarray, w_OI: np.ndarray, pair: Pair, scale: float) -> np.ndarray:
    """Return x W + scale (x A) B."""
    a_RI, b_RO = pair
    return x_TI @ w_OI.T + scale * (x_TI @ a_RI.T) @ b_RO


def linear_backward(
    dy_TO: np.ndarray, x_TI: np.ndarray, w_OI: np.ndarray, pair: Pair, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the cotangents of x, A and B."""
    a_RI, b_RO = pair
    du_TR = scale * dy_TO @ b_RO.T
    return dy_TO @ w_OI + du_TR @ a_RI, du_TR.T @ x_TI, scale * (x_TI @ a_RI.T).T @ dy_TO


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Return x / sqrt(mean(x^2) + eps) * weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def norm_backward(g: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Return the cotangent of x."""
    r, g = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps), g * weight
    return r * (g - x * r * r * np.mean(x * g, axis=-1, keepdims=True))


def rotate(x_TNH: np.ndarray, theta: float, sign: float = 1.0) -> np.ndarray:
    """Rotate the pairs (i, i + H/2) by their position's angles; with sign -1 it is its own transpose."""
    T, _, H = x_TNH.shape
    angle_T1h = np.arange(T)[:, None, None] * theta ** (-np.arange(H // 2) / (H // 2))
    cos, sin, (left, right) = np.cos(angle_T1h), sign * np.sin(angle_T1h), np.split(x_TNH, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(
    q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, visible_TS: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the output (T, N, H), query head n on key/value head n // (N / K), and the weights (N, T, S).

    A query that sees no key gets zeros.
    """
    group = q_TNH.shape[1] // k_SKH.shape[1]
    k_SNH, v_SNH = (np.repeat(x, group, axis=1) for x in (k_SKH, v_SKH))
    s_NTS = np.einsum("tnh,snh->nts", q_TNH, k_SNH) * q_TNH.shape[-1] ** -0.5
    s_NTS = np.where(visible_TS, s_NTS, -np.inf)
    top_NT1 = np.max(s_NTS, axis=-1, keepdims=True)
    p_NTS = np.exp(s_NTS - np.where(np.isfinite(top_NT1), top_NT1, 0))
    p_NTS /= np.maximum(np.sum(p_NTS, axis=-1, keepdims=True), np.finfo(float).tiny)
    return np.einsum("nts,snh->tnh", p_NTS, v_SNH), p_NTS


def attention_backward(
    do_TNH: np.ndarray, q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, p_NTS: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the cotangents of q, k and v."""
    S, K, H = k_SKH.shape
    group, scale = q_TNH.shape[1] // K, H**-0.5
    k_SNH, v_SNH = (np.repeat(x, group, axis=1) for x in (k_SKH, v_SKH))
    dp_NTS = np.einsum("tnh,snh->nts", do_TNH, v_SNH)
    ds_NTS = p_NTS * (dp_NTS - np.sum(dp_NTS * p_NTS, axis=-1, keepdims=True)) * scale
    summed = lambda x_SNH: x_SNH.reshape(S, K, group, H).sum(axis=2)  # noqa: E731
    dq_TNH = np.einsum("nts,snh->tnh", ds_NTS, k_SNH)
    dk_SKH = summed(np.einsum("nts,tnh->snh", ds_NTS, q_TNH))
    return dq_TNH, dk_SKH, summed(np.einsum("nts,tnh->snh", p_NTS, do_TNH))


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Return the logarithms of the softmax."""
    shifted = logits_TV - np.max(logits_TV, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


class Reference:
    """The toy with an adapter.

    Args:
        config: sizes.
        tensors: base weights by the names that files have.
        weights: the adapter's arrays by flat name.
        rank: of the adapter.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray], rank: int
    ):
        self._config, self._scale = config, ALPHA / rank
        self._base = {name.removesuffix(".weight"): np.asarray(a, np.float64) for name, a in tensors.items()}
        self._lora = {name: np.asarray(a, np.float64) for name, a in weights.items()}
        self._head = self._base.get("lm_head", self._base["model.embed_tokens"])

    def logprobs(self, tokens_T: np.ndarray) -> np.ndarray:
        """Return log p of every token after each position, (T, V)."""
        return log_softmax(self._forward(tokens_T)[0])

    def gradients(self, data: list[TrainExample]) -> tuple[list[np.ndarray], Gradients]:
        """Return each example's target logprobs (T,), and the gradient of minus their weighted sum by flat name."""
        total: Gradients = defaultdict(lambda: np.zeros(()))
        found = []
        for example in data:
            logits_TV, h_TD, layers = self._forward(example.tokens_T)
            logprobs_TV, at = log_softmax(logits_TV), np.arange(len(example.targets))
            found.append(logprobs_TV[at, example.targets])
            weights_T1 = np.asarray(example.inputs["weights"], np.float64)[:, None]
            dlogits_TV = weights_T1 * np.exp(logprobs_TV)
            dlogits_TV[at, example.targets] -= weights_T1[:, 0]
            pair = pair_of(self._lora, "unembed", None)
            dx_TD, total_a, total_b = linear_backward(dlogits_TV, h_TD, self._head, pair, self._scale)
            total["unembed.A"], total["unembed.B"] = total["unembed.A"] + total_a, total["unembed.B"] + total_b
            dx_TD = norm_backward(dx_TD, layers[-1]["y"], self._base["model.norm"], self._config.norm_eps)
            for i in reversed(range(self._config.n_layers)):
                dx_TD = self._layer_backward(i, dx_TD, layers[i], total)
        c = self._config
        stacks = {name for name in self._lora if not name.startswith("unembed")}
        whole = {
            name: np.stack([total[f"{name}.{i}"] for i in range(c.n_layers)]) if name in stacks else total[name]
            for name in self._lora
        }
        return found, {name: grad.reshape(self._lora[name].shape) for name, grad in whole.items()}

    def _forward(self, tokens_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[dict[str, np.ndarray]]]:
        """Return the logits (T, V), the head's input (T, D), and what each layer computed."""
        x_TD, layers = self._base["model.embed_tokens"][tokens_T], []
        for i in range(self._config.n_layers):
            layers.append(self._layer(i, x_TD))
            x_TD = layers[-1]["y"]
        h_TD = norm(x_TD, self._base["model.norm"], self._config.norm_eps)
        return linear(h_TD, self._head, pair_of(self._lora, "unembed", None), self._scale), h_TD, layers

    def _module(self, i: int, name: str) -> tuple[np.ndarray, Pair, float]:
        room = "self_attn" if name in "qkvo" else "mlp"
        return self._base[f"model.layers.{i}.{room}.{name}_proj"], pair_of(self._lora, name, i), self._scale

    def _norm(self, i: int, name: str, x: np.ndarray, backward: np.ndarray | None = None) -> np.ndarray:
        weight, eps = self._base[f"model.layers.{i}.{name}"], self._config.norm_eps
        return norm(x, weight, eps) if backward is None else norm_backward(backward, x, weight, eps)

    def _layer(self, i: int, x_TD: np.ndarray) -> dict[str, np.ndarray]:
        c, T, saved = self._config, len(x_TD), {"x": x_TD}
        saved["h"] = self._norm(i, "input_layernorm", x_TD)
        for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
            saved[name] = linear(saved["h"], *self._module(i, name)).reshape(T, heads, c.head_dim)
        for name in "qk":
            saved[f"{name}_rotated"] = rotate(self._norm(i, f"self_attn.{name}_norm", saved[name]), c.rope_theta)
        visible_TS = np.tril(np.ones((T, T), bool))
        o_TNH, saved["p"] = attention(saved["q_rotated"], saved["k_rotated"], saved["v"], visible_TS)
        saved["o"] = o_TNH.reshape(T, -1)
        saved["x2"] = x_TD + linear(saved["o"], *self._module(i, "o"))
        saved["h2"] = self._norm(i, "post_attention_layernorm", saved["x2"])
        gate, saved["up"] = (linear(saved["h2"], *self._module(i, name)) for name in ("gate", "up"))
        saved["gate"], saved["sigmoid"] = gate, 1 / (1 + np.exp(-gate))
        saved["hidden"] = gate * saved["sigmoid"] * saved["up"]
        saved["y"] = saved["x2"] + linear(saved["hidden"], *self._module(i, "down"))
        return saved

    def _layer_backward(self, i: int, dy_TD: np.ndarray, saved: dict[str, np.ndarray], total: Gradients) -> np.ndarray:
        c, T = self._config, len(dy_TD)

        def through(name: str, dy: np.ndarray, x: str) -> np.ndarray:
            dx, da, db = linear_backward(dy.reshape(T, -1), saved[x], *self._module(i, name))
            for part, grad in (("A", da), ("B", db)):
                total[f"{name}.{part}.{i}"] = total[f"{name}.{part}.{i}"] + grad
            return dx

        dhidden, sigmoid, gate = through("down", dy_TD, "hidden"), saved["sigmoid"], saved["gate"]
        dgate = dhidden * saved["up"] * sigmoid * (1 + gate * (1 - sigmoid))
        dh2_TD = through("gate", dgate, "h2") + through("up", dhidden * gate * sigmoid, "h2")
        dx2_TD = dy_TD + self._norm(i, "post_attention_layernorm", saved["x2"], dh2_TD)
        do_TNH = through("o", dx2_TD, "o").reshape(T, c.n_heads, c.head_dim)
        inputs = saved["q_rotated"], saved["k_rotated"], saved["v"], saved["p"]
        cotangents = dict(zip("qkv", attention_backward(do_TNH, *inputs), strict=True))
        for name in "qk":
            unrotated = rotate(cotangents[name], c.rope_theta, -1.0)
            cotangents[name] = self._norm(i, f"self_attn.{name}_norm", saved[name], unrotated)
        dh_TD = sum((through(name, cotangents[name], "h") for name in "qkv"), np.zeros(()))
        return dx2_TD + self._norm(i, "input_layernorm", saved["x"], dh_TD)


def adamw(weights: Mapping[str, np.ndarray], each: list[Mapping[str, np.ndarray]], adam: AdamSettings) -> Gradients:
    """Return the weights, float64, after a step with each of some gradients; all are by flat name.

    As torch has it: eps outside the root, decoupled decay, and a gradient clipped by its global norm.
    """
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    m, v = ({name: np.zeros(a.shape) for name, a in w.items()} for _ in range(2))
    for step, grads in enumerate(each, 1):
        whole = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        clip = min(1.0, adam.grad_clip_norm / (whole + 1e-6)) if adam.grad_clip_norm > 0 else 1.0
        for name, old in w.items():
            g = np.asarray(grads[name], np.float64) * clip
            m[name] = adam.beta1 * m[name] + (1 - adam.beta1) * g
            v[name] = adam.beta2 * v[name] + (1 - adam.beta2) * g * g
            root = np.sqrt(v[name] / (1 - adam.beta2**step))
            direction = m[name] / (1 - adam.beta1**step) / (root + adam.eps)
            w[name] = old - adam.learning_rate * (direction + adam.weight_decay * old)
    return w
