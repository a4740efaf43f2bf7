"""Texts of the command line's help: what it is for, a first run, examples of each command, exit codes."""

DESCRIPTION = """\
Find the intruder dimensions of a LoRA adapter and scale them down, one matrix
at a time. An intruder is one of the largest singular directions of a matrix
after fine-tuning which resembles none that the base had before it.
"""

EXIT_CODES = """\
exit codes:
  0 done
  1 unexpected
  2 usage
  3 bad or inconsistent input
  4 output exists or does not match
  5 locked by another run
  6 I/O, space, or lost workers; the same command resumes
  7 numeric or verification failure
  8 input changed during the run
  128+N stopped by signal N; the same command resumes
"""

EPILOG = (
    """\
a first run:
  streamer demo
      the whole job on a generated model, in seconds
  streamer inspect BASE ADAPTER
      what would be done, matrix by matrix
  streamer detect BASE ADAPTER -o findings.safetensors
      find the intruders, once
  streamer mitigate BASE ADAPTER -o DIR --findings findings.safetensors
      a mitigated adapter, for PEFT
  streamer merge BASE ADAPTER -o DIR --findings findings.safetensors
      a plain model with the mitigated adapter merged in
  streamer evaluate BASE ADAPTER --general TEXT --task TEXT -o FILE
      what each method and lambda keeps and forgets, on your text
  streamer repair BASE ADAPTER --task TEXT --general TEXT -o DIR
      an adapter that forgets less, if measurements show it
  streamer fit BASE ADAPTER --general TEXT --task TEXT -o FILE
      what repair uses: the adapter fitted to your text
  streamer map BASE --general TEXT -o base.map.safetensors
      once for a base: then --map FILE repairs its adapters without any text
  streamer verify DIR
      every byte as it was written, after a copy for example

BASE is a model directory (or one .safetensors file), ADAPTER a PEFT adapter's
directory. detect, mitigate and merge take several, or a directory of adapters,
and read the base once for all; inspect, evaluate,
fit, repair and verify take one.
Results go to stdout, progress to stderr.

"""
    + EXIT_CODES
)

EXAMPLES = {
    "inspect": """\
examples:
  streamer inspect BASE
  streamer inspect BASE ADAPTER
  streamer inspect BASE ADAPTER --json | jq .totals
""",
    "detect": """\
examples:
  streamer detect BASE ADAPTER -o findings.safetensors
  streamer detect BASE ADAPTER -o all.safetensors --top-k 0.1 --epsilon 0.6
  streamer detect BASE ADAPTER1 ADAPTER2 -o found
      writes found/ADAPTER1.safetensors and found/ADAPTER2.safetensors
  streamer detect BASE ADAPTER -o f.safetensors --max-memory 4G --dry-run
  streamer detect BASE ADAPTER -o f.safetensors --workers 4
""",
    "mitigate": """\
examples:
  streamer mitigate BASE ADAPTER -o mild --lambda 0.75
  streamer mitigate BASE ADAPTER -o half --lambda 0.5 --findings f.safetensors
  streamer mitigate BASE ADAPTER -o half --lambda 0.4 --overwrite
      another lambda in the same place
  streamer mitigate BASE ADAPTER -o as-lora --to-lora 32
  streamer mitigate BASE ADAPTER -o fitted --coefficients c.safetensors
      each direction of the adapter as `streamer fit` found it
  streamer mitigate BASE ADAPTER -o repaired --map base.map.safetensors
      what `streamer map` made of BASE, once for all its adapters
""",
    "merge": """\
examples:
  streamer merge BASE ADAPTER -o merged --lambda 0.5
  streamer merge BASE ADAPTER -o merged --lambda 0.5 --findings f.safetensors
  streamer merge BASE ADAPTER1 ADAPTER2 -o models --findings found
  streamer merge BASE ADAPTER -o plain --dequantize
      a plain model, where BASE is quantized
""",
    "report": """\
examples:
  streamer report findings.safetensors
  streamer report findings.safetensors --json | jq .totals
  streamer report findings.safetensors evaluation.json -o report.html
      a page with pictures, of findings alone too
  streamer report DIR -o report.html
      one page of all findings in DIR, which `detect` wrote for several adapters
  streamer report findings.safetensors -o figures
      the pictures as SVG and PNG, in a directory
  streamer report f.safetensors BASE ADAPTER --coefficients c.safetensors
      what coefficients leave of the intruders
  streamer report merged
      what streamer.json of an output says
""",
    "diff": """\
examples:
  streamer diff findings.safetensors after.safetensors
      after: findings on the mitigated adapter, say
  streamer diff before.safetensors after.safetensors --json | jq .totals
""",
    "verify": """\
examples:
  streamer verify merged
      sizes, digests, index and shards against the record in it
  streamer verify findings.safetensors
  streamer verify merged BASE ADAPTER
      its configs and files too, and 3 matrices recomputed by independent code
  streamer verify merged BASE ADAPTER --sample all
      every matrix, and every other tensor byte by byte
""",
    "evaluate": """\
examples:
  streamer evaluate BASE ADAPTER --general web.txt --task chats.jsonl -o e.json
  streamer evaluate BASE ADAPTER --general g.npy --task t.npy -o e --dry-run
  streamer evaluate BASE ADAPTER --general g.npy --task t.npy -o e --keep 0.8
  streamer evaluate BASE ADAPTER --general g --task t -o e.json --lambda 0.78
      adds lambda 0.78 to an evaluation of the same texts
  streamer evaluate BASE ADAPTER --general g --task t -o e --coefficients c
""",
    "fit": """\
examples:
  streamer fit BASE ADAPTER --general g.txt --task t.jsonl -o c.safetensors
  streamer fit BASE ADAPTER --general g.npy --task t.npy -o c --keep 0.95,0.9
      two sets in one file
  streamer fit BASE ADAPTER --general g.npy --task t.npy -o c --dry-run
""",
    "map": """\
examples:
  streamer map BASE --general web.txt -o base.map.safetensors
  streamer map BASE -o base.map.safetensors
      on text that comes with Python
  streamer map a.safetensors b.safetensors -o both.safetensors
      the sum of two maps of one base
""",
    "repair": """\
examples:
  streamer repair BASE ADAPTER --task t.jsonl -o repaired
  streamer repair BASE ADAPTER --task t.jsonl --general g.txt -o repaired
  streamer repair BASE ADAPTER --task t.npy --general g.npy -o model --merge
""",
    "demo": """\
examples:
  streamer demo
  streamer demo --lambda 0.5 -o demo
      keeps the model, the adapter and all that is made of them
""",
}
