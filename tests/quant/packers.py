"""Packs weights as quantized checkpoints have them, in NumPy, from the public definitions of the formats.

Nothing here is shared with the loader. Every packer takes float weights [N, K] and returns the tensors of one weight by
part and the fp32 weight that they stand for. A tensor is (dtype name of safetensors, array of its bytes' type).
"""

from __future__ import annotations

import json

import numpy as np

NAMES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.array(
    (
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ),
    np.float32,
)


def e4m3_table():
    """Value of every float8_e4m3fn byte: sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where(byte & 127 == 127, np.nan, value)
    return np.where(byte >= 128, -value, value).astype(np.float32)


E4M3 = e4m3_table()


def to_e4m3(x):
    positive = E4M3[:127]
    nearest = np.abs(np.abs(x)[..., None] - positive).argmin(-1).astype(np.uint8)
    return np.where(x < 0, nearest | 128, nearest).astype(np.uint8)


def write(path, tensors):
    """A safetensors file of {name: array or (dtype name, array)}."""
    header, blobs, offset = {}, [], 0
    for name, value in tensors.items():
        dtype, array = value if isinstance(value, tuple) else (NAMES[value.dtype.name], value)
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        blobs.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def words(codes, bits, axis):
    """Packs unsigned codes into int32 words along `axis`, the lowest bits first; the last word is filled with 0."""
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    per = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // per), np.uint64)
    for i in range(per):
        packed |= codes[..., i::per] << np.uint64(bits * i)
    return np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis)


def group_of(k, size, rng=None):
    """Group of each column: in place, or as act-order leaves it."""
    index = np.arange(k) // size
    return index if rng is None else index[rng.permutation(k)]


def integer_groups(w, bits, index, symmetric, dtype=np.float16):
    """Unsigned codes [N, K], scales and zeros [N, G] of groups of columns."""
    n, groups, top = w.shape[0], int(index.max()) + 1, 2**bits - 1
    scale, zero = np.zeros((n, groups), dtype), np.zeros((n, groups), np.int64)
    for g in range(groups):
        part = w[:, index == g]
        if symmetric:
            scale[:, g], zero[:, g] = np.abs(part).max(1) / (2 ** (bits - 1) - 0.5), 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), -1e-3), np.maximum(part.max(1), 1e-3)
            scale[:, g] = (high - low) / top
            zero[:, g] = np.clip(np.round(-low / scale[:, g].astype(np.float32)), 1, top)
    wide = scale.astype(np.float32)
    codes = np.clip(np.round(w / wide[:, index]) + zero[:, index], 0, top).astype(np.int64)
    return codes, scale, zero, ((codes - zero[:, index]) * wide[:, index]).astype(np.float32)


def gptq(w, bits=4, size=32, symmetric=False, act_order=None, version=1, with_index=True):
    index = group_of(w.shape[1], size, act_order)
    codes, scale, zero, value = integer_groups(w, bits, index, symmetric)
    tensors = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words((zero - (version == 1)).T, bits, 1),
        "scales": scale.T,
    }
    return tensors | ({"g_idx": index.astype(np.int32)} if with_index else {}), value


def awq(w, size=32):
    codes, scale, zero, value = integer_groups(w, 4, group_of(w.shape[1], size), False)

    def pack(columns):  # [R, N]
        packed = np.zeros((columns.shape[0], columns.shape[1] // 8), np.uint32)
        for lane, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            packed |= columns[:, column::8].astype(np.uint32) << np.uint32(4 * lane)
        return packed.view(np.int32)

    return {"qweight": pack(codes.T), "qzeros": pack(zero.T), "scales": scale.T}, value


def ct_packed(w, bits=4, size=32, symmetric=True, act_order=None):
    """compressed-tensors pack-quantized; `size` None: per channel."""
    index = group_of(w.shape[1], size or w.shape[1], act_order)
    codes, scale, zero, value = integer_groups(w, bits, index, symmetric, np.float32)
    tensors = {
        "weight_packed": words(codes, bits, 1),
        "weight_scale": scale,
        "weight_shape": np.array(w.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zero, bits, 0)
    if act_order is not None:
        tensors["weight_g_idx"] = index.astype(np.int32)
    return tensors, value


def ct_int8(w, per="channel", symmetric=True):
    index = np.zeros(w.shape[1], np.int64)
    codes, scale, zero, value = integer_groups(w, 8, index, symmetric, np.float32)
    if per == "tensor":
        scale = np.array([np.abs(w).max() / 127], np.float32)
        codes = np.round(w / scale).astype(np.int64) + 128
        value = ((codes - 128) * scale).astype(np.float32)
    tensors = {"weight": (codes - 128).astype(np.int8), "weight_scale": scale}
    return tensors | ({} if symmetric else {"weight_zero_point": (zero - 128).astype(np.int8)}), value


def fp8(w, rows, cols, scale_name="weight_scale"):
    """Scale per block; `rows` or `cols` 0: all of them."""
    n, k = w.shape
    r, c = rows or n, cols or k
    scale = np.zeros((-(-n // r), -(-k // c)), np.float32)
    codes, value = np.zeros(w.shape, np.uint8), np.zeros(w.shape, np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = np.s_[i * r : (i + 1) * r, j * c : (j + 1) * c]
            scale[i, j] = np.abs(w[block]).max() / 448
            codes[block] = to_e4m3(w[block] / scale[i, j])
            value[block] = E4M3[codes[block]] * scale[i, j]
    return {"weight": ("F8_E4M3", codes), scale_name: scale.reshape(1) if not rows else scale}, value


def mxfp4(w):
    """Weights [..., N, K] -> blocks [..., N, K / 32, 16] and scales, and what they stand for."""
    blocks = w.reshape(*w.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2
    codes = np.abs((blocks / 2.0**exponent)[..., None] - E2M1).argmin(-1).astype(np.uint8)
    value = (E2M1[codes] * 2.0**exponent).astype(np.float32).reshape(w.shape)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"blocks": packed, "scales": (exponent[..., 0] + 127).astype(np.uint8)}, value


def nf4(w, block=32, nested=False):
    flat = w.reshape(-1, block)
    absmax = np.abs(flat).max(1).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(w.shape)}
    tensors = {"weight.quant_map": NF4}
    if nested:
        table = np.linspace(-1, 1, 256).astype(np.float32)
        offset, size = float(absmax.mean()), 256
        padded = np.pad(absmax - offset, (0, -absmax.size % size)).reshape(-1, size)
        outer = np.maximum(np.abs(padded).max(1), 1e-6).astype(np.float32)
        inner = np.abs((padded / outer[:, None])[..., None] - table).argmin(-1).astype(np.uint8)
        absmax = ((table[inner] * outer[:, None]).reshape(-1)[: absmax.size] + np.float32(offset)).astype(np.float32)
        tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": table}
        tensors["weight.absmax"] = inner.reshape(-1)[: absmax.size]
        state |= {"nested_blocksize": size, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        tensors["weight.absmax"] = absmax
    codes = np.abs((flat / absmax[:, None])[..., None] - NF4).argmin(-1).astype(np.uint8).reshape(-1)
    tensors["weight"] = (codes[0::2] << 4 | codes[1::2])[:, None]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    value = (NF4[codes].reshape(-1, block) * absmax[:, None]).reshape(w.shape)
    return tensors | {"weight.quant_state.bitsandbytes__nf4": text}, value
