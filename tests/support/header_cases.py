"""Headers of safetensors files that the format permits and forbids, and the words of the refusals."""

import struct

from hypothesis import strategies as st

from streamer.storage.header import DTYPE_BITS

F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def file_of(body: str | bytes, data: int = 4) -> bytes:
    """A whole file: length field, header, zeros."""
    raw = body.encode() if isinstance(body, str) else body
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'


ACCEPTED = {
    "one tensor": file_of(f'{{"a":{F32}}}'),
    "nothing": file_of("{}", 0),
    "metadata": file_of(f'{{"__metadata__":{{"k":"v"}},"a":{F32}}}'),
    "metadata last": file_of(f'{{"a":{F32},"__metadata__":{{"k":"v"}}}}'),
    "metadata null": file_of(f'{{"__metadata__":null,"a":{F32}}}'),
    "padded": file_of(f' \n\t\r{{"a" : {F32}}} \n\t\r'),
    "scalar": file_of(entry(shape="[]")),
    "zero-size": file_of(entry(shape="[3,0]", offsets="[0,0]"), 0),
    "zero-size between": file_of(
        f'{{"a":{F32},"z":{{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}}}'
    ),
    "zero-size at the same offset": file_of(
        f'{{"a":{F32},"z":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}'
    ),
    "out of order": file_of(f'{{"b":{F32.replace("[0,4]", "[4,8]")},"a":{F32}}}', 8),
    "unknown field": file_of(entry(more=',"note":[{"x":1e-999}]')),
    "fields in a row": file_of('{"a":["F32",[1],[0,4]]}'),
    "dtype as a map": file_of(entry('{"F32":null}')),
    "escapes": file_of(
        '{"\\u0000\\ud83d\\ude00":{"d\\u0074ype":"F\\u00332","shape":[1],"data_offsets":[0,4]}}'
    ),
    "no name": file_of(f'{{"":{F32}}}'),
    "whole bytes of 4 bits": file_of(entry('"F4"', "[2,4]")),
    "whole bytes of 6 bits": file_of(entry('"F6_E2M3"', "[4]", "[0,3]"), 3),
    "the largest size": file_of(entry(shape="[18446744073709551615,0]", offsets="[0,0]"), 0),
    "nested 127 levels": file_of(entry(more=f',"x":{"[" * 125}{"]" * 125}')),
}


REFUSED = {
    "no JSON": (file_of(b"", 0), "Expecting value"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "can't decode byte 0xff"),
    "a byte order mark": (file_of(b"\xef\xbb\xbf{}", 0), "BOM"),
    "a list": (file_of("[]", 0), "the header is not a JSON object"),
    "junk after": (file_of("{}x", 0), "Extra data"),
    "NUL padding": (file_of("{}\0", 0), "Extra data"),
    "a trailing comma": (
        file_of(f'{{"a":{F32},}}'),
        ": line 1 column 5",
    ),  # after words of Python's own, which change
    "a raw control character": (file_of(f'{{"\x01":{F32}}}'), "Invalid control character"),
    "a lone surrogate": (file_of(f'{{"\\ud800":{F32}}}'), "surrogates not allowed"),
    "NaN": (file_of(entry(more=',"x":NaN')), "NaN is not a finite number"),
    "a number beyond a double": (file_of(entry(more=',"x":1e999')), "1e999 is not a finite number"),
    "an integer beyond a double": (
        file_of(entry(more=f',"x":{"9" * 400}')),
        "is not a finite number",
    ),
    "nested 128 levels": (
        file_of(entry(more=f',"x":{"[" * 126}{"]" * 126}')),
        "tensor 'a': nested too deeply",
    ),
    "nested without end": (file_of("[" * 200_000 + "]" * 200_000), "nested too deeply"),
    "a tensor twice": (file_of(f'{{"a":{F32},"a":{F32}}}'), "key 'a' appears twice"),
    "a field twice": (file_of(entry(more=',"shape":[1]')), "key 'shape' appears twice"),
    "metadata twice": (
        file_of('{"__metadata__":{},"__metadata__":{}}', 0),
        "key '__metadata__' appears twice",
    ),
    "metadata of numbers": (
        file_of('{"__metadata__":{"k":1}}', 0),
        "not a map from string to string",
    ),
    "metadata of nulls": (
        file_of('{"__metadata__":{"k":null}}', 0),
        "not a map from string to string",
    ),
    "metadata a list": (file_of('{"__metadata__":[]}', 0), "not a map from string to string"),
    "metadata a string": (file_of('{"__metadata__":""}', 0), "not a map from string to string"),
    "metadata false": (file_of('{"__metadata__":false}', 0), "not a map from string to string"),
    "metadata 0": (file_of('{"__metadata__":0}', 0), "not a map from string to string"),
    "a tensor of null": (file_of('{"a":null}'), "tensor 'a': expected an object, found NoneType"),
    "four fields in a row": (
        file_of('{"a":["F32",[1],[0,4],1]}'),
        "tensor 'a': expected an object, found list",
    ),
    "no dtype": (
        file_of('{"a":{"shape":[1],"data_offsets":[0,4]}}'),
        "tensor 'a': 'dtype' is missing",
    ),
    "no shape": (
        file_of('{"a":{"dtype":"F32","data_offsets":[0,4]}}'),
        "tensor 'a': 'shape' is missing",
    ),
    "no offsets": (
        file_of('{"a":{"dtype":"F32","shape":[1]}}'),
        "tensor 'a': 'data_offsets' is missing",
    ),
    "an unknown dtype": (file_of(entry('"F128"')), "tensor 'a': unknown dtype 'F128'"),
    "a dtype in lower case": (file_of(entry('"f32"')), "tensor 'a': unknown dtype 'f32'"),
    "a dtype of a number": (
        file_of(entry("4")),
        "tensor 'a': expected a dtype, a list of sizes and a pair of offsets",
    ),
    "two dtypes": (
        file_of(entry('{"F32":null,"F16":null}')),
        "tensor 'a': expected a dtype, a list of sizes and a pair of offsets",
    ),
    "a negative size": (
        file_of(entry(shape="[-1]")),
        "tensor 'a': expected a dtype, a list of sizes and a pair of offsets",
    ),
    "a size of −0": (
        file_of(entry(shape="[-0]", offsets="[0,0]"), 0),
        "expected a dtype, a list of sizes and a pair of offsets",
    ),
    "a size of 1.0": (
        file_of(entry(shape="[1.0]")),
        "tensor 'a': expected a dtype, a list of sizes and a pair of offsets",
    ),
    "a size of true": (
        file_of(entry(shape="[true]")),
        "tensor 'a': expected a dtype, a list of sizes and a pair of offsets",
    ),
    "a size beyond 64 bits": (
        file_of(entry(shape="[18446744073709551616,0]")),
        "expected a dtype, a list of sizes and a pair of offsets",
    ),
    "no list of sizes": (
        file_of(entry(shape="1")),
        "tensor 'a': expected a dtype, a list of sizes and a pair of offsets",
    ),
    "too many elements": (file_of(entry(shape=f"[{2**63},2]")), "more elements than 64 bits count"),
    "too many elements, then none": (
        file_of(entry(shape=f"[{2**63},2,0]")),
        "more elements than 64 bits count",
    ),
    "too many bits": (file_of(entry(shape=f"[{2**60}]")), "do not fill whole bytes"),
    "three offsets": (
        file_of(entry(offsets="[0,4,4]")),
        "expected a dtype, a list of sizes and a pair of offsets",
    ),
    "backward offsets": (
        file_of(entry(offsets="[4,0]")),
        "expected 4 bytes for F32 [1], data_offsets give -4",
    ),
    "offsets too far apart": (
        file_of(entry(offsets="[0,8]"), 8),
        "expected 4 bytes for F32 [1], data_offsets give 8",
    ),
    "half a byte": (
        file_of(entry('"F4"', "[1]", "[0,1]"), 1),
        "1 values of F4 do not fill whole bytes",
    ),
    "two bits over": (
        file_of(entry('"F6_E3M2"', "[3]", "[0,3]"), 3),
        "3 values of F6_E3M2 do not fill whole bytes",
    ),
    "a hole": (
        file_of(entry(offsets="[4,8]"), 8),
        "tensor 'a': expected to begin at offset 0, begins at 4",
    ),
    "an overlap": (
        file_of(f'{{"a":{F32},"b":{F32}}}'),
        "tensor 'b': expected to begin at offset 4, begins at 0",
    ),
    "zero-size inside another": (
        file_of(f'{{"a":{F32},"z":{{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}}}'),
        "tensor 'z': expected to begin at offset 4, begins at 2",
    ),
}


NAMES = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda s: s != "__metadata__")


SHAPES = st.lists(st.integers(0, 5), max_size=4)


@st.composite
def entries(draw: st.DrawFn) -> list[tuple[str, str, list[int]]]:
    """Tensors of any name, dtype and shape that ends on a byte."""
    out = []
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(SHAPES)
        out.append((name, dtype, [*shape, 8] if DTYPE_BITS[dtype] < 8 else shape))
    return out
