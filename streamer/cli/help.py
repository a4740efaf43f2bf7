"""Define the help texts: description, first run, examples of each command, exit codes."""

DESCRIPTION = """\
Make a LoRA adapter forget less of its base model, one matrix at a time. An
intruder dimension is one of the largest singular directions of a fine-tuned
matrix that resembles none of the base's.
"""

EXIT_CODES = """\
exit codes:
  0 done
  1 unexpected error
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
  streamer inspect BASE ADAPTER
      see which tensor each module changes, and what a run would need
  streamer repair BASE ADAPTER --task TEXT --general TEXT -o DIR
      write an adapter that forgets less, as measured on your texts
  streamer mitigate BASE ADAPTER --method shrink --lambda 0.75 -o DIR
      without texts: scale the whole adapter
  streamer merge BASE DIR --lambda 1 -o MODEL
      write a plain model with that adapter merged in
  streamer evaluate BASE ADAPTER --general TEXT --task TEXT -o FILE
      measure what each method and lambda keeps and forgets
  streamer map BASE --general TEXT -o base.map.safetensors
      map a base once; with --map, no adapter of that base needs task text
  streamer detect BASE ADAPTER -o findings.safetensors
      find the intruders, once
  streamer demo
      find and remove planted intruders in a generated model, in seconds
  streamer verify DIR
      check every byte of an output, for example after a copy

BASE is a model directory or a .safetensors file, ADAPTER the directory of a
PEFT adapter; both can be hub names or addresses. detect, mitigate and merge
accept several adapters and read the base once; other commands accept one.
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
      replaces the output with one for a different lambda
  streamer mitigate BASE ADAPTER -o as-lora --to-lora 32
  streamer mitigate BASE ADAPTER -o fitted --coefficients c.safetensors
      apply the factors that `streamer fit` found
  streamer mitigate BASE ADAPTER -o repaired --map base.map.safetensors
      apply a map of BASE, made once for all its adapters
""",
    "merge": """\
examples:
  streamer merge BASE ADAPTER -o merged --lambda 0.5
  streamer merge BASE ADAPTER -o merged --lambda 0.5 --findings f.safetensors
  streamer merge BASE ADAPTER1 ADAPTER2 -o models --findings found
  streamer merge BASE ADAPTER -o plain --dequantize
      a plain model, if BASE is quantized
""",
    "report": """\
examples:
  streamer report findings.safetensors
  streamer report findings.safetensors --json | jq .totals
  streamer report evaluation.json -o report.html
  streamer report findings.safetensors evaluation.json -o report.html
      a page with figures
  streamer report DIR -o report.html
      one page for a directory of findings, from several adapters
  streamer report merged
      the record (streamer.json) of an output
""",
    "diff": """\
examples:
  streamer diff findings.safetensors after.safetensors
      for example, of an adapter and of its mitigated version
  streamer diff before.safetensors after.safetensors --json | jq .totals
""",
    "verify": """\
examples:
  streamer verify merged
      checks sizes and digests against the record
  streamer verify findings.safetensors
  streamer verify merged BASE ADAPTER
      also recomputes 3 matrices
  streamer verify merged BASE ADAPTER --sample all
      recomputes every matrix, and compares every other tensor byte by byte
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
      writes two sets into one file
  streamer fit BASE ADAPTER --general g.npy --task t.npy -o c --dry-run
""",
    "map": """\
examples:
  streamer map BASE --general web.txt -o base.map.safetensors
  streamer map BASE -o base.map.safetensors
      uses text that comes with Python
  streamer map a.safetensors b.safetensors -o both.safetensors
      joins two maps of one base
""",
    "repair": """\
examples:
  streamer repair BASE ADAPTER --task t.jsonl -o repaired
  streamer repair BASE ADAPTER --task t.jsonl --general g.txt -o repaired
  streamer repair BASE ADAPTER --task t.npy --general g.npy -o model --merge
  streamer repair BASE ADAPTER --task t.jsonl -o repaired --to-lora 32
      also for DoRA, LoHa, LoKr and fine-tuned models
""",
    "demo": """\
examples:
  streamer demo
  streamer demo --lambda 0.5 -o demo
      keeps the model, the adapter and all results in ./demo
""",
}
