"""The page: its sentences and data, what it escapes, that it loads nothing, its size, the same bytes again."""

import base64
import dataclasses
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluations import of_findings

import streamer
from streamer.api.report import ReportRequest
from streamer.detection.findings import Findings
from streamer.errors import FormatError
from streamer.evaluation.words import figures, verdict
from streamer.events import Monitor
from streamer.plan.name_matching import natural
from streamer.report.page import certificates, headline, make_page, open_subject, sentences

EVIL = "</script><img src=x onerror=alert(1)>\x1b]0;&\u2028"


def embedded(page: bytes) -> dict[str, Any]:
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.decode(), re.DOTALL
    )
    return json.loads(text)


def test_the_sentences_and_data_of_findings(findings: Findings) -> None:
    (asked,) = sentences(findings)
    assert (
        "the 9 matrices that “adapter” changes in “base”, detection compared the 10 leading singular"
        in asked
    )
    one = dataclasses.replace(findings, options=dataclasses.replace(findings.options, top_k=1))
    assert "compared the leading singular direction of base + adapter with" in sentences(one)[0]
    assert headline(findings)[0].startswith(
        f"{findings.intruders} intruders in 9 of 9 matrices, with "
    )
    assert (
        certificates(findings)
        == "Certificates: in 9 of 9 matrices, every decision is proven equal to the full SVD's."
    )
    tree = embedded(make_page(findings))["findings"]
    assert tree["epsilon"] == 0.5
    assert [one["name"] for one in tree["matrices"]] == sorted(
        (m.tensor for m in findings), key=natural
    )
    for one in tree["matrices"]:
        d = findings[one["name"]].detection
        assert one["intruders"] == [*d.intruders]
        assert one["values"] == [float(f"{s:.4g}") for s in d.singular_values]
        for low, high, least, most in zip(
            one["low"], one["high"], d.similarity_low, d.similarity_high, strict=True
        ):
            assert least - 1e-4 < low <= least <= most <= high < most + 1e-4


def test_the_page_loads_nothing_and_runs_its_own_script_alone(findings: Findings) -> None:
    text = make_page(of_findings(findings)).decode()
    assert re.findall(r"(?:src|href)=[\"']?(?!data:,)[^\"' >]+", text) == []
    assert "@import" not in text
    assert "url(" not in text
    assert re.findall(r"https?://[^\s\"']+", text) == ["http://www.w3.org/2000/svg"]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    assert (
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'"
        in text
    )
    assert "innerHTML" not in text


def test_the_same_findings_give_the_same_bytes_without_paths(
    findings: Findings, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    page = make_page(findings)
    findings.save(tmp_path / "elsewhere.safetensors")
    assert make_page(open_subject(tmp_path / "elsewhere.safetensors")) == page
    assert str(pair[0].parent).encode() not in page


def test_hostile_names_are_escaped_in_the_page(findings: Findings) -> None:
    matrices = tuple(
        dataclasses.replace(m, tensor=f"{EVIL}.{i}.weight") for i, m in enumerate(findings)
    )
    sources = {"base": {"name": EVIL}, "adapter": {"name": EVIL}}
    evaluation = of_findings(findings)
    texts = {side: {**text, "name": EVIL} for side, text in evaluation.facts["texts"].items()}
    evil = dataclasses.replace(findings, matrices=matrices, sources=sources)
    for subject in (
        evil,
        dataclasses.replace(evaluation, facts={**evaluation.facts, "texts": texts}),
    ):
        page = make_page(subject).decode()
        assert "<img" not in page
        assert page.count("</script>") == 2
        assert "\x1b" not in page
        assert "\u2028" not in page
    assert (
        html.escape("</script><img src=x onerror=alert(1)>\\x1b]0;&\\u2028")
        in make_page(evil).decode()
    )


def test_the_verdict_comes_first_and_commands_are_code(findings: Findings) -> None:
    evaluation = of_findings(findings)
    for subject in (findings, evaluation):
        text = make_page(subject).decode()
        said = html.escape(headline(subject)[0])
        assert text.index(f'<p class="verdict">{said}</p>') < text.index("<h1>") + 200
        commands = [
            re.sub(r"</?span>", "", c)
            for c in re.findall(r'<pre class="command"><code>(.*?)</code></pre>', text)
        ]
        assert commands
        assert all(command.startswith("streamer ") for command in commands)
        assert not re.search(r"<(?:p|li)>[^<]*streamer (?:evaluate|mitigate|repair|report) ", text)
    best = evaluation.best()
    assert headline(evaluation)[0][1:-1] == verdict(evaluation, best)[1:]
    assert "has not been measured yet" in headline(findings)[0]


def test_an_evaluation_is_shown_with_its_suggestion(findings: Findings) -> None:
    page = make_page(of_findings(findings))
    tree = embedded(page)["evaluation"]
    assert tree["suggested"] is not None
    assert tree["suggested"] in page.decode()
    assert {v["series"] for v in tree["variants"]} == {
        "base",
        "adapter",
        "paper",
        "project",
        "shrink",
    }
    assert all(v["kept_se"] >= 0 for v in tree["variants"])
    assert [c["head"] for c in tree["columns"]] == [c.head for c in figures(of_findings(findings))]


def test_names_of_variants_are_the_same_everywhere_in_the_page(findings: Findings) -> None:
    evaluation = of_findings(findings)
    variants = tuple(dataclasses.replace(v, name=f"{v.name}\x1b") for v in evaluation.variants)
    tree = embedded(make_page(dataclasses.replace(evaluation, variants=variants)))["evaluation"]
    names = {v["name"] for v in tree["variants"]}
    assert tree["front"]
    assert {*tree["front"], tree["suggested"]} <= names


def test_figures_that_are_not_finite_are_refused(findings: Findings) -> None:
    detection = dataclasses.replace(findings[0].detection, delta_norm=float("nan"))
    broken = dataclasses.replace(
        findings, matrices=(dataclasses.replace(findings[0], detection=detection),)
    )
    with pytest.raises(
        FormatError,
        match=r"a figure of model\.layers\.0\.mlp\.down_proj\.weight is NaN or Inf; run detect again",
    ):
        ReportRequest(findings=broken).run(Monitor())


def test_findings_of_nothing_and_without_intruders(findings: Findings) -> None:
    make_page(dataclasses.replace(findings, matrices=()))
    none = dataclasses.replace(findings[0].detection, intruders=(), intruder_energy=0.0)
    clean = dataclasses.replace(
        findings, matrices=(dataclasses.replace(findings[0], detection=none),)
    )
    assert headline(clean)[0].startswith("0 intruders in 0 of 1 matrix. ")
    make_page(clean)
    one = dataclasses.replace(findings[0].detection, intruders=findings[0].detection.intruders[:1])
    single = dataclasses.replace(
        findings, matrices=(dataclasses.replace(findings[0], detection=one),)
    )
    assert "In the 1 matrix that" in sentences(single)[0]
    assert headline(single)[0].startswith("1 intruder in 1 of 1 matrix, with ")


def test_the_record_of_an_output(
    pair: tuple[Path, Path], findings: Findings, tmp_path: Path
) -> None:
    streamer.reduce_intruder_dimension(
        *pair, tmp_path / "out", findings=findings, mitigation_lambda=0.5
    )
    subject = open_subject(tmp_path / "out")
    made, compare, lost = sentences(subject)
    assert "made this from “adapter” and “base”" in made
    assert headline(subject)[0].startswith(
        "Method paper, select all, lambda 0.5: 9 of 9 matrices mitigated, 9 intruders scaled."
    )
    assert "baseline of equal norm: --method shrink --lambda 0." in compare
    assert lost.startswith("lost in projection: at most ")
    streamer.merge_with_reduced_intruder_dimensions(
        *pair, tmp_path / "merged", findings=findings, mitigation_lambda=0.5
    )
    assert "baseline of equal norm" in sentences(open_subject(tmp_path / "merged"))[1]
    tree = embedded(make_page(subject))["output"]
    assert len(tree["delta_norm"]) == 9
    record = tmp_path / "out" / "streamer.json"
    record.write_text(record.read_text().replace('"method"', '"mehtod"'))
    with pytest.raises(FormatError, match="`streamer verify` gives details"):
        open_subject(tmp_path / "out")
