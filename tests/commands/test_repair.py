"""`streamer repair` and what uses its fit, from outside: what they write, choose, measure, say and refuse."""

import hashlib
import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from causal_models import make_adapter
from forks import Server
from learned import make_learned, write_texts
from safetensors.torch import load_file
from test_schemas import check
from tokenized_texts import save

import streamer
from streamer.cli.tables import NO_LIMIT, repair_table
from streamer.fitting import choice
from streamer.measuring.texts import BUILT_IN, read_text
from streamer.report.page import headline, open_subject


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("repair"), 48, 32)


def texts(home: Path) -> list[object]:
    return ["--general", home / "general.npy", "--task", home / "task.npy", "--sequences", 48]


@pytest.fixture(scope="module")
def fitted(server: Server, home: Path) -> Path:
    tree = check(
        server.run(
            "repair", home / "base", home / "adapter", *texts(home), "-o", home / "f", "--json"
        ),
        "streamer.repair/1",
    )
    assert tree["fit"] == str(home / "f.fit.safetensors")
    return Path(tree["fit"])


def test_an_adapter_of_new_right_factors(
    server: Server, home: Path, fitted: Path, tmp_path: Path
) -> None:
    """lora_B is the adapter's to the bit, PEFT loads it, and it is measured as the fit said."""
    out = tmp_path / "out"
    line = [home / "base", home / "adapter", "-o", out, "--coefficients", fitted]
    record = check(server.run("mitigate", *line, "--json"), "streamer.output/2")
    assert (
        record["method"],
        record["lambda"],
        record["detection"],
        record["totals"]["changed"],
    ) == (
        "regmean",
        None,
        None,
        8,
    )
    assert record["file"] == fitted.name
    assert (
        f"streamer verify OUTPUT base adapter --sample all --coefficients {fitted.name}"
        in (out / "README.md").read_text()
    )
    ((_, check_command),) = headline(open_subject(out))[1]
    assert (
        check_command
        == f"streamer verify OUTPUT BASE ADAPTER --sample all --coefficients {fitted.name}"
    )
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (home / "adapter", out)
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("lora_B" in name), name
    found = streamer.load_coefficients(fitted)
    for name, tensor in after.items():
        if "lora_A" in name:
            matrix = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            torch.testing.assert_close(tensor, found.matrices[matrix].T)
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(home / "base"), out
    )
    assert model.active_adapter == "default"
    held = streamer.evaluate_variants(
        home / "base",
        home / "adapter",
        general=home / "general.npy",
        task=home / "task.npy",
        coefficients=fitted,
        methods=["regmean"],
        on_event=lambda event: None,
    )
    assert [v.name for v in held.variants] == ["base", "adapter", "regmean 0.9"]


def test_verify_takes_the_file_of_the_fit(
    server: Server, home: Path, fitted: Path, tmp_path: Path
) -> None:
    inputs = home / "base", home / "adapter"
    for command, out in (("mitigate", tmp_path / "a"), ("merge", tmp_path / "m")):
        assert server.run(command, *inputs, "-o", out, "--coefficients", fitted, "-q").code == 0
        alone = server.run("verify", out, *inputs)
        words = f"found no '{fitted.name}' beside it; pass the file with --coefficients"
        assert (alone.code, words in alone.err) == (3, True)
        beside = shutil.copy(fitted, tmp_path / fitted.name)
        for more in ([], ["--coefficients", fitted]):
            whole = server.run("verify", out, *inputs, "--sample", "all", *more)
            assert "8 of 8 matrices recomputed" in whole.out
        shutil.copy(home / "task.npy", beside)
        wrong = server.run("verify", out, *inputs)
        assert (wrong.code, f"{beside}: expected a safetensors file" in wrong.err) == (3, True)
        Path(beside).unlink()
        other = server.run("verify", out, *inputs, "--coefficients", home / "task.npy")
        assert (other.code, "expected a safetensors file" in other.err) == (3, True)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    path = tmp_path / "a" / "adapter_model.safetensors"
    data = b""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert server.run("verify", tmp_path / "a", *inputs, "--coefficients", fitted).code == 7, name


def test_the_repair_is_never_what_is_not_better(server: Server, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    done = server.run("repair", home / "base", home / "adapter", *texts(home), "-o", out, "--json")
    tree = check(done, "streamer.repair/1")
    facts = streamer.load_coefficients(tree["fit"]).facts
    verdict = facts["sets"][0]["shrink"]["verdict"]
    worth = facts["sets"][0]["trade"]["worth_it"]
    assert tree["chosen"] == ("repair" if verdict == "better" else "shrink") or (
        tree["chosen"] == "adapter" and not worth
    )
    record = json.loads((out / "streamer.json").read_text())
    assert record["method"] == ("regmean" if tree["chosen"] == "repair" else "shrink")
    first, *shrinks, last = tree["rows"]
    assert (first["what"], last["what"]) == ("adapter", "repair")
    strengths = [float(row["name"].removeprefix("shrink ")) for row in shrinks]
    assert strengths == sorted(strengths, reverse=True)
    assert {0.8, 0.5} <= {*strengths}
    assert [row["what"] for row in tree["rows"] if row["written"]] == [tree["chosen"]]
    assert (len(record["measured"]), record["repair"]["rows"]) == (
        1 + len(tree["rows"]),
        tree["rows"],
    )
    card = (out / "README.md").read_text()
    assert all(line in card for line in record["measured"])
    assert record["measured"][0] == tree["why"]
    page = tmp_path / "page.html"
    report = server.run("report", out, "-o", page)
    assert report.code == 0
    assert (
        report.out.rstrip().split("\n\n")[-2].splitlines()[-len(record["measured"]) :]
        == record["measured"]
    )
    assert html.escape(tree["why"][1:]) in page.read_text()
    peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(home / "base"), out
    )
    again = check(
        server.run("repair", home / "base", home / "adapter", *texts(home), "-o", out, "--json"),
        "streamer.repair/1",
    )
    assert again == {**tree, "state": "present"}
    shown = server.run("repair", home / "base", home / "adapter", *texts(home), "-o", out)
    models = [line.split()[0] for line in shown.out.splitlines()[2 : 2 + len(tree["rows"])]]
    assert models == ["adapter", *["shrink"] * len(shrinks), "regmean"]
    assert shown.last.startswith("streamer: repair: exists already, in ")
    heads = ["model", "kept", "behaviour kept", "KL left", "loss left"]
    assert re.split(r"  +", shown.out.splitlines()[0].strip()) == heads
    assert "top-1 kept is not shown: the adapter's change is too small" in shown.out
    what = {
        "repair": f"--coefficients {tree['fit']}",
        "shrink": f"--method shrink --lambda {record['lambda']}",
        "adapter": "",
    }
    then = [
        line for line in shown.out.splitlines() if line.startswith("next, on text that nothing was")
    ]
    assert [line.partition("-o FILE ")[2] for line in then] == [what[tree["chosen"]]] * (
        tree["chosen"] != "adapter"
    )
    assert server.run("verify", out, home / "base", home / "adapter").code == 0
    if tree["chosen"] != "repair":
        done = server.run(
            "verify", out, home / "base", home / "adapter", "--coefficients", tree["fit"]
        )
        assert (done.code, "is not needed for an output of method 'shrink'" in done.err) == (
            2,
            True,
        )


def choose(
    fitted: Path, shrink: dict[str, Any], *, worth: tuple[bool, bool] = (True, True), **facts: Any
) -> choice.Choice:
    """Choose by the figures of the fit, some of them changed; `worth` says if the fit and the shrink are worth what they give up."""
    found = streamer.load_coefficients(fitted)
    first: Any = found.facts["sets"][0]
    trades = [{**first["trade"], "worth_it": worth_it} for worth_it in worth]
    other = {**first["shrink"], "lambda": 0.5, "trade": trades[1], **shrink}
    changed: Any = {
        **found.facts,
        "sets": [{**first, "trade": trades[0], "shrink": other}],
        **facts,
    }
    return choice.choose(replace(found, facts=changed))


@pytest.mark.parametrize(
    ("verdict", "forgotten", "chosen", "method"),
    [
        ("better", True, "repair", "regmean"),
        ("not told apart", True, "shrink", "shrink"),
        ("worse", True, "shrink", "shrink"),
        ("better", False, "adapter", "shrink"),
        ("the adapter", True, "adapter", "shrink"),
    ],
)
def test_the_choice_follows_the_verdict(
    fitted: Path, verdict: str, forgotten: bool, chosen: str, method: str
) -> None:
    """The adapter is the shrink by 1, with which a repair that keeps more is compared."""
    whole = {"lambda": 1.0} if verdict == "the adapter" else {}
    what, why, made = choose(fitted, {"verdict": verdict, **whole}, forgotten=forgotten)
    assert (what, made.get("method", "regmean")) == (chosen, method)
    assert (made.get("mitigation_lambda") == 1) == (chosen == "adapter")
    assert why


def test_an_empty_name_is_not_the_built_in_text(home: Path, tmp_path: Path) -> None:
    """The command line refuses every empty argument; the library must not take this one for None."""
    words = "expected the name of a text to end in .txt, .jsonl, .npy, found ''"
    with pytest.raises(streamer.StreamerError, match=words):
        streamer.repair_adapter(
            home / "base", home / "adapter", tmp_path / "r", task=home / "task.npy", general=""
        )
    with pytest.raises(streamer.StreamerError, match=words):
        streamer.map_inputs(home / "base", general="")


def adapted(home: Path, path: Path, **options: Any) -> Path:
    """Another kind of adapter on the base."""
    return make_adapter(transformers.LlamaForCausalLM, home / "base", path, **options)


def test_what_cannot_be_written_is_refused_before_the_fit(
    server: Server, home: Path, tmp_path: Path
) -> None:
    inputs = home / "base", home / "adapter"
    dora = adapted(home, tmp_path / "dora", targets=["q_proj"], use_dora=True)
    for more in ([], ["--merge"]):
        done = server.run("repair", home / "base", dora, *texts(home), "-o", tmp_path / "d", *more)
        assert (done.code, done.err) == (
            3,
            f"streamer: {dora}: is DoRA, and repair needs LoRA factors; pass --to-lora RANK, or use `merge` with --method shrink or "
            "--map\n",
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    done = server.run("repair", *inputs, *texts(home), "-o", tmp_path / "full")
    assert (
        done.code,
        "full: holds mine.txt, and " in done.err,
        "does not exist; choose another" in done.err,
    ) == (
        4,
        True,
        True,
    )
    for options in ([], ["--overwrite"]):
        done = server.run(
            "repair", *inputs, *texts(home), "-o", tmp_path / "full" / "mine.txt", *options
        )
        assert (
            done.code,
            "mine.txt: is a file, not a directory; choose another output" in done.err,
        ) == (4, True)
    done = server.run("repair", *inputs, *texts(home), "-o", tmp_path / "q", "--dequantize")
    assert (done.code, "applies only to a model, which `--merge` writes" in done.err) == (2, True)
    assert not [p for p in tmp_path.iterdir() if "fit" in p.name]


@pytest.mark.parametrize("kind", ["DoRA", "a model"])
def test_an_adapter_without_factors_is_converted_first(
    server: Server, tmp_path: Path, kind: str
) -> None:
    """The conversion is what `mitigate` writes, the fit and the output belong to it, and a run that stands stays."""
    home = make_learned(
        tmp_path / "home", sequences=48, **({"use_dora": True} if kind == "DoRA" else {})
    )
    base = home / "base"
    adapter = home / "adapter"
    out = tmp_path / "r"
    if kind == "a model":
        adapter = home / "model"
        streamer.merge_with_reduced_intruder_dimensions(
            base, home / "adapter", adapter, method="shrink", mitigation_lambda=1
        )
    line = ["repair", base, adapter, *texts(home), "-o", out, "--to-lora", 4]
    first = server.run(*line, "--dry-run")
    assert (first.code, f"forecast only of {out}.lora, which the fit needs" in first.err) == (
        0,
        True,
    )
    assert not [*tmp_path.glob("r*")]
    tree = check(server.run(*line, "--json"), "streamer.repair/1")
    assert (tree["lora"], tree["fit"], tree["output"]) == (
        f"{out}.lora",
        f"{out}.fit.safetensors",
        str(out),
    )
    alone = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "a", method="shrink", mitigation_lambda=1, to_lora=4
    )
    weights = "adapter_model.safetensors"
    assert (
        load_file(Path(tree["lora"]) / weights).keys() == load_file(tmp_path / "a" / weights).keys()
    )
    for name, tensor in load_file(tmp_path / "a" / weights).items():
        assert torch.equal(tensor, load_file(Path(tree["lora"]) / weights)[name])
    record = json.loads((out / "streamer.json").read_text())
    assert record["adapter"]["name"] == "r.lora"
    assert (
        alone["adapter"]["digest"]
        != record["adapter"]["digest"]
        == streamer.detect_intruder_dimensions(base, tree["lora"], top_k=1).record()["adapter"][
            "digest"
        ]
    )
    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), out)
    again = server.run(*line)
    assert f"{out} exists already" in again.out
    assert (
        f"converted first: {out}.lora is {adapter} as a LoRA adapter, and was repaired in its place"
        in again.out
    )
    assert again.last.startswith("streamer: repair: exists already, in ")
    (done,) = [json.loads(server.run(*line, "--dry-run", "--json").out)]
    assert (done["command"], done["state"]) == ("repair", "done")


def test_adapters_of_other_methods_are_refused_by_name(
    server: Server, home: Path, tmp_path: Path
) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(home / "base")
    peft.get_peft_model(model, peft.LoKrConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lokr"
    )
    done = server.run(
        "repair", home / "base", tmp_path / "lokr", *texts(home), "-o", tmp_path / "d", "--merge"
    )
    assert (
        done.code,
        "lokr: is LoKr, and repair needs LoRA factors; pass --to-lora RANK" in done.err,
    ) == (
        3,
        True,
    )


def test_without_a_general_text_the_built_in_one_serves(home: Path, tmp_path: Path) -> None:
    """Each of its documents is another, and longer than the sequences of a map; a map and a fit record it by name and digest."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(vocab_size=600, **shape)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # so that next tokens are far from equally likely
    model.save_pretrained(tmp_path / "base")
    save(tmp_path / "base", start=False)
    text = read_text(BUILT_IN, tmp_path / "base", sequences=1000, length=128)
    assert {len(ids) for ids in text.ids} == {128}
    assert len({ids.tobytes() for ids in text.ids}) == len(text.ids) > 100
    data = BUILT_IN.read_bytes()
    told = BUILT_IN.name, hashlib.sha256(len(data).to_bytes(8, "little") + data).hexdigest()
    (used,) = streamer.map_inputs(tmp_path / "base", on_event=lambda event: None).facts["texts"]
    assert (used["name"], used["sample_sha256"], used["sequences"]) == (*told, 32)
    adapter = adapted(tmp_path, tmp_path / "adapter", lora_alpha=4)
    write_texts(tmp_path, tmp_path / "base", adapter, 24, 32)
    made = streamer.repair_adapter(
        tmp_path / "base",
        adapter,
        tmp_path / "r",
        task=tmp_path / "task.npy",
        on_event=lambda event: None,
    )
    used = streamer.load_coefficients(made["fit"]).facts["texts"]["general"]
    assert (used["name"], used["sample_sha256"]) == told
    with pytest.raises(
        streamer.StreamerError, match=r"has no tokenizer, which built-in.jsonl needs"
    ):
        streamer.repair_adapter(
            home / "base", home / "adapter", tmp_path / "n", task=home / "task.npy"
        )


def test_chats_of_the_built_in_text_are_written_by_the_chat_template(tmp_path: Path) -> None:
    save(tmp_path, start=False)
    plain = read_text(BUILT_IN, tmp_path, sequences=1000, length=96)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    )
    documents = [json.loads(line) for line in BUILT_IN.read_text().splitlines()]
    for refused in ("", "{{ raise_exception('no chat') }}"):
        tokenizer.chat_template = refused + template
        tokenizer.save_pretrained(tmp_path)
        read = read_text(BUILT_IN, tmp_path, sequences=1000, length=96)
        chats = [
            number
            for number, document in enumerate(documents)
            if "as_chat" in document and not refused
        ]
        pairs = zip(read.ids, plain.ids, strict=True)
        assert [number for number, (a, b) in enumerate(pairs) if not np.array_equal(a, b)] == chats
        for number in chats:
            assert tokenizer.decode(read.ids[number]).startswith(
                f"<{documents[number]['as_chat'][0]['role']}>"
            )
            assert read.counted[number][1:].all()


@pytest.mark.parametrize(
    ("worth", "chosen"),
    [((False, False), "adapter"), ((False, True), "shrink"), ((True, False), "shrink")],
)
def test_what_is_not_worth_it_is_not_written(
    fitted: Path, worth: tuple[bool, bool], chosen: str
) -> None:
    what, why, made = choose(fitted, {"verdict": "worse"}, worth=worth)
    assert (what, made["mitigation_lambda"] == 1) == (chosen, chosen == "adapter")
    rule = "a written variant regains over 0.5 of what it gives up, by two standard errors"
    assert (
        why.startswith("the adapter as it is: regmean 0.9 regains ") and why.endswith(rule)
    ) == (chosen == "adapter")


def test_a_share_of_a_change_too_small_to_measure_is_not_stated(fitted: Path) -> None:
    """What is kept of the behaviour, which needs no labels, is stated in its place."""
    reliable = {"kept": False, "forgetting": True, "top1_kept": True}
    for verdict, start in (
        ("better", "regmean 0.9: it keeps "),
        ("worse", "shrink 0.5: it keeps "),
    ):
        why = choose(fitted, {"verdict": verdict}, reliable=reliable).why
        assert why.startswith(start)
        assert " of its behaviour on the task and leaves " in why
        assert "learned" not in why


def test_the_command_that_follows_measures_what_was_written(home: Path, tmp_path: Path) -> None:
    row: Any = {"what": "repair", "name": "regmean 0.9", "written": True}
    row |= dict.fromkeys(choice.SHARES_MEASURED, 0.5) | {
        f"{name}_se": 0.01 for name in choice.SHARES_MEASURED
    }
    record: Any = {
        "schema": "streamer.repair/1",
        "why": "",
        "rows": [row],
        "fit": "o.fit.safetensors",
        "output": "o",
        "reliable": {"kept": True, "forgetting": True, "top1_kept": True},
        "state": "written",
    }
    written = streamer.reduce_intruder_dimension(
        home / "base", home / "adapter", tmp_path / "o", method="shrink", mitigation_lambda=0.8125
    )
    for chosen, ends in (
        ("repair", "-o FILE --coefficients o.fit.safetensors"),
        ("shrink", "-o FILE --method shrink --lambda 0.8125"),
        ("adapter", None),
    ):
        shown = repair_table(
            {**record, "chosen": chosen}, written, ("BASE", "ADAPTER"), NO_LIMIT
        ).splitlines()
        assert [line for line in shown if "streamer evaluate" in line] == [
            line for line in shown[-1:] if ends
        ]
        assert ends is None or shown[-1].endswith(ends)


def test_an_adapter_that_improves_general_text_is_repaired(
    server: Server, home: Path, tmp_path: Path
) -> None:
    """As on an instruction-tuned base: the loss on general text falls, and the divergence from the base says what is forgotten."""
    ids = np.load(home / "task.npy")
    np.save(tmp_path / "near.npy", ids[::-1])
    line = ["repair", home / "base", home / "adapter", "--task", home / "task.npy", "--general"]
    done = server.run(*line, tmp_path / "near.npy", "-o", tmp_path / "a", "--json")
    tree = check(done, "streamer.repair/1")
    facts = streamer.load_coefficients(tree["fit"]).facts
    assert facts["forgetting"] < 0 < facts["divergence"]
    assert facts["forgotten"]
    assert "no evidence" not in tree["why"]
    same = server.run(*line, home / "task.npy", "-o", tmp_path / "b")
    assert "both texts are the same, so the fit is a shrink, Δ / (1 + mu)" in same.err
