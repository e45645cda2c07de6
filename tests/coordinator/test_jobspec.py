"""Job files: what is complete, what is refused, and that every mistake is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator import jobspec
from fleetune.coordinator.jobspec import Complaint, JobFileError, JobSpec
from fleetune.errors import ConfigError

JOBS = Path(__file__).resolve().parents[2] / "deploy/config/jobs"

CLASSIFICATION = """
name = "job"
[model]
base = "org/name"
[task]
kind = "text-classification"
labels = ["no", "yes"]
[data]
name = "rows"
"""
CAUSAL = CLASSIFICATION.replace("text-classification", "causal-lm").replace('labels = ["no", "yes"]\n', "")


def complaints_of(text: str) -> dict[str, Complaint]:
    with pytest.raises(JobFileError) as caught:
        jobspec.parse(text)
    return {complaint.path: complaint for complaint in caught.value.complaints}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_job_is_right_and_begins_with_its_command(path: Path) -> None:
    text = path.read_text("utf-8")
    assert isinstance(jobspec.parse(text), JobSpec)
    assert text.splitlines()[0] == f"# fleetune submit deploy/config/jobs/{path.name} --wait"


def test_there_is_an_example_for_each_task_and_each_method() -> None:
    specs = [jobspec.parse(path.read_text("utf-8")) for path in JOBS.glob("*.toml")]
    assert {spec.task.kind for spec in specs} == {"text-classification", "causal-lm", "seq2seq-lm", None}
    assert {spec.method.name for spec in specs} == {"fedavg_lora", "deft", "fedspine", "fedara", "echo"}


def test_a_minimal_classification_is_completed_by_its_task() -> None:
    spec = jobspec.parse(CLASSIFICATION)
    assert (spec.data.text, spec.data.label, spec.data.mask_prompt) == ("text", "label", False)
    assert (spec.training.steps, spec.training.epochs) == (0, 1.0)
    assert spec.evaluation.metric == "accuracy"


def test_a_causal_job_reads_plain_text_unless_it_names_other_columns() -> None:
    assert jobspec.parse(CAUSAL).data.text == "text"
    chat = jobspec.parse(CAUSAL + 'chat = "turns"')
    assert (chat.data.text, chat.data.chat, chat.data.mask_prompt) == ("", "turns", True)
    assert jobspec.parse(CAUSAL).evaluation.metric == "loss"


def test_a_seq2seq_job_reads_input_and_target() -> None:
    spec = jobspec.parse(CAUSAL.replace("causal-lm", "seq2seq-lm") + 'target = "summary"')
    assert (spec.data.input, spec.data.target) == ("input", "summary")


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(jobspec.parse(CLASSIFICATION), "seed", 3)  # noqa: B010  # checkers would refuse the plain assignment


def test_echo_needs_nothing_but_a_name() -> None:
    spec = jobspec.parse('name = "link"\n[method]\nname = "echo"')
    assert spec.task.kind is None
    assert spec.evaluation.source == "none"


@pytest.mark.parametrize(
    ("importance", "warm", "needed"), [("fleet", 0, 8), ("fleet", 1, 8), ("fleet", 3, 10), ("own", 0, 7), ("own", 3, 10)]
)
def test_warm_rounds_count_among_those_that_fedspine_needs(importance: str, warm: int, needed: int) -> None:
    text = (
        f'{CLASSIFICATION}[lora]\ntargets = ["query"]\n[training]\nsteps = 60\n'
        f'[method]\nname = "fedspine"\nimportance = "{importance}"\nwarm_rounds = {warm}\n[rounds]\ncount = '
    )
    assert jobspec.parse(f"{text}{needed}").method.uncut_rounds == needed - 7
    found = complaints_of(f"{text}{needed - 1}")
    assert set(found) == {"rounds.count"}
    assert found["rounds.count"].allowed.startswith(f"at least {needed},")
    assert "method.warm_rounds" in found["rounds.count"].remedy


def test_any_job_becomes_a_link_test_by_its_method_alone() -> None:
    spec = jobspec.parse(CLASSIFICATION + '[method]\nname = "echo"\nstate_mib = 2')
    assert (spec.model.base, spec.data.name, spec.method.state_mib) == ("", "", 2.0)


def test_all_mistakes_are_told_at_once() -> None:
    found = complaints_of(
        """
        name = 3
        sead = 1
        [model]
        bsae = "org/name"
        rank = 3
        [task]
        kind = "causallm"
        labels = ["a", 3]
        [lora]
        rank = "8"
        alpha = nan
        [rounds]
        quorum = 0
        count = true
        [training]
        steps = 1
        epochs = 1
        """
    )
    assert set(found) == {
        "name",
        "sead",
        "model.bsae",
        "model.rank",
        "task.kind",
        "task.labels",
        "lora.rank",
        "lora.alpha",
        "rounds.quorum",
        "rounds.count",
        "training.epochs",
        "data.name",
    }
    assert found["lora.rank"] == Complaint(
        "lora.rank", '"8"', "a whole number from 1 to 1024", "Set lora.rank to a whole number from 1 to 1024."
    )


def test_a_slip_of_the_pen_gets_the_name_that_was_meant() -> None:
    found = complaints_of(CLASSIFICATION + "[rounds]\ncont = 3\n[lora]\nbatch_size = 3\n[method]\nname = 'fedavg_lra'")
    assert found["rounds.cont"].remedy == "Unknown; did you mean rounds.count?"
    assert found["lora.batch_size"].remedy == "Unknown here; it belongs into [training]."
    assert found["method.name"].remedy == 'Did you mean "fedavg_lora"?'


def test_a_misspelt_required_setting_is_not_also_told_missing() -> None:
    assert set(complaints_of(CLASSIFICATION.replace("base =", "bsae ="))) == {"model.bsae"}


def test_an_empty_file_is_told_all_that_is_required() -> None:
    assert set(complaints_of("")) == {"name", "model.base", "task.kind", "data.name"}


def test_text_that_is_no_toml_is_told_line_and_column() -> None:
    complaint = complaints_of('name = "a"\nseed = = 3')[""]
    assert complaint.remedy.startswith("line 2, column 8")


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 50_000,
        "x = 1979-99-99",
        "x = " + "9" * 5000,
        "a." * 3000 + "b = 1",
        "\x00",
        "x = '\ud800'",
        "[[model]]\n",
        "#" * (2 << 20),
    ],
    ids=["nesting", "date", "digits", "dotted", "nul", "surrogate", "array of tables", "size"],
)
def test_hostile_text_is_a_complaint(text: str) -> None:
    with pytest.raises(JobFileError) as caught:
        jobspec.parse(text)
    assert isinstance(caught.value, ConfigError)
    assert all(len(complaint.sentence()) < 1000 for complaint in caught.value.complaints)


def test_a_section_that_is_a_value_is_told_so() -> None:
    assert complaints_of(CLASSIFICATION.replace("[model]", "lora = 3\n[model]"))["lora"].remedy == "Write its settings under a line [lora]."


def test_complaints_are_bounded() -> None:
    with pytest.raises(JobFileError) as caught:
        jobspec.parse("\n".join(f"key{number} = 1" for number in range(5000)))
    assert len(caught.value.complaints) == jobspec.COMPLAINTS_MAX


@pytest.mark.parametrize(
    ("base", "right"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("/srv/models/x", True),
        ("~/models/x", True),
        ("./models/x", False),
        ("../x", False),
        ("a/b/c", False),
        ("org//name", False),
        ("https://hub/x", False),
    ],
)
def test_a_base_is_a_hub_id_or_a_full_path(base: str, right: bool) -> None:
    text = CLASSIFICATION.replace("org/name", base)
    if right:
        assert jobspec.parse(text).model.base == base
    else:
        assert "model.base" in complaints_of(text)


RULES: list[tuple[str, str, str]] = [
    ("one label", CLASSIFICATION.replace('"no", "yes"', '"no"'), "task.labels"),
    ("labels twice", CLASSIFICATION.replace('"no", "yes"', '"no", "no"'), "task.labels"),
    ("labels missing", CLASSIFICATION.replace('labels = ["no", "yes"]\n', ""), "task.labels"),
    ("labels of a language model", CAUSAL.replace('"causal-lm"', '"causal-lm"\nlabels = ["a", "b"]'), "task.labels"),
    ("a hub id without the hub", CLASSIFICATION.replace('"org/name"', '"org/name"\nallow_hub = false'), "model.allow_hub"),
    ("revision of a folder", CLASSIFICATION.replace('"org/name"', '"/srv/x"\nrevision = "main"'), "model.revision"),
    ("chat in a classification", CLASSIFICATION + 'chat = "c"', "data.chat"),
    ("two kinds of rows", CAUSAL + 'chat = "c"\ntext = "t"', "data"),
    ("input without target", CAUSAL + 'input = "c"', "data"),
    ("one column for two", CLASSIFICATION + 'text = "c"\nlabel = "c"', "data"),
    ("an empty column", CLASSIFICATION + 'text = ""', "data.text"),
    ("target length without target", CAUSAL + "max_target_length = 8", "data.max_target_length"),
    ("a mask without a prompt", CAUSAL + "mask_prompt = true", "data.mask_prompt"),
    ("a mask in a classification", CLASSIFICATION + "mask_prompt = false", "data.mask_prompt"),
    ("steps and epochs", CLASSIFICATION + "[training]\nsteps = 1\nepochs = 1", "training.epochs"),
    ("no steps", CLASSIFICATION + "[training]\nsteps = 0", "training.steps"),
    ("no epochs", CLASSIFICATION + "[training]\nepochs = 0.0", "training.epochs"),
    ("neither", CLASSIFICATION + "[training]\nsteps = 0\nepochs = 0", "training.steps"),
    ("targets twice", CLASSIFICATION + '[lora]\ntargets = ["q", "q"]', "lora.targets"),
    ("a relative adapter", CLASSIFICATION + '[lora]\ninit_adapter = "./a"', "lora.init_adapter"),
    ("a job id with a space", CLASSIFICATION + '[lora]\ninit_adapter = "a b"', "lora.init_adapter"),
    ("a state size for training", CLASSIFICATION + "[method]\nstate_mib = 3", "method.state_mib"),
    ("momentum for nobody", CLASSIFICATION + "[method]\nserver_momentum = 0.5", "method.server_momentum"),
    ("beta for fedavgm", CLASSIFICATION + '[method]\nserver_optimizer = "fedavgm"\nserver_beta1 = 0.5', "method.server_beta1"),
    ("mu for echo", 'name = "e"\n[method]\nname = "echo"\nproximal_mu = 1', "method.proximal_mu"),
    ("held-out rows missing", CLASSIFICATION + '[evaluation]\nsource = "heldout"', "evaluation.heldout"),
    ("held-out rows relative", CLASSIFICATION + '[evaluation]\nsource = "heldout"\nheldout = "x.jsonl"', "evaluation.heldout"),
    ("held-out rows unused", CLASSIFICATION + '[evaluation]\nheldout = "/x.jsonl"', "evaluation.heldout"),
    ("accuracy of a language model", CAUSAL + '[evaluation]\nmetric = "accuracy"', "evaluation.metric"),
    (
        "patience without figures",
        CLASSIFICATION + '[evaluation]\nsource = "none"\n[rounds]\nearly_stop_patience = 2',
        "rounds.early_stop_patience",
    ),
    ("a delta without patience", CLASSIFICATION + "[rounds]\nearly_stop_min_delta = 0.1", "rounds.early_stop_min_delta"),
    ("an infinite rate", CLASSIFICATION + "[training]\nlearning_rate = inf", "training.learning_rate"),
    ("a negative deadline", CLASSIFICATION + "[rounds]\ndeadline_s = -1", "rounds.deadline_s"),
    ("an enormous seed", CLASSIFICATION.replace("name =", "seed = 99999999999999999999\nname =", 1), "seed"),
    ("a name that is a path", CLASSIFICATION.replace('"job"', '"../job"'), "name"),
]


@pytest.mark.parametrize(("text", "path"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_a_broken_rule_is_the_only_complaint(text: str, path: str) -> None:
    found = complaints_of(text)
    assert list(found) == [path]
    assert found[path].remedy


def test_server_optimizers_get_a_rate_of_their_own() -> None:
    for optimizer, rate in (("fedavgm", 1.0), ("fedadam", 0.01), ("fedyogi", 0.01)):
        spec = jobspec.parse(CLASSIFICATION + f'[method]\nserver_optimizer = "{optimizer}"')
        assert spec.method.server_learning_rate == rate


DEFT = CLASSIFICATION + '[method]\nname = "deft"\n'

DEFT_RULES: list[tuple[str, str, str]] = [
    ("a layout for fedavg", CLASSIFICATION + '[method]\nlayout = "blocks"', "method.layout"),
    ("spares for fedavg", CLASSIFICATION + "[method]\nspares = true", "method.spares"),
    ("an uplink for echo", CLASSIFICATION + '[method]\nname = "echo"\nuplink_mbps = 8', "method.uplink_mbps"),
    ("a server optimiser", DEFT + 'server_optimizer = "fedadam"', "method.server_optimizer"),
    ("the pull of FedProx", DEFT + "proximal_mu = 0.1", "method.proximal_mu"),
    ("auto with a layout", CLASSIFICATION + '[method]\nname = "auto"\nlayout = "depth"', "method.layout"),
    ("a solver without blocks", DEFT + 'layout = "depth"\nsolver = "exact"', "method.solver"),
    ("blocks on a single device", DEFT + 'layout = "single"\nlayers_per_block = 2', "method.layers_per_block"),
    ("turns in data-parallel", DEFT + 'layout = "data-parallel"\nrotate_rounds = 2', "method.rotate_rounds"),
    ("a bandwidth of airtime", DEFT + 'resource = "airtime"\nuplink_mbps = 8', "method.uplink_mbps"),
    ("a deadline before the end", DEFT + "deadline_factor = 0.5", "method.deadline_factor"),
    ("several steps of a gradient", DEFT + "[training]\nsteps = 4", "training.steps"),
    ("no step of a gradient", DEFT + "[training]\nsteps = 0", "training.steps"),
    ("epochs of a gradient", DEFT + "[training]\nepochs = 1", "training.epochs"),
    ("deltas in epochs", DEFT + 'payload = "deltas"\n[training]\nepochs = 1', "training.epochs"),
    ("deltas of no steps", DEFT + 'payload = "deltas"', "training.steps"),
    ("an optimiser for deltas", DEFT + 'payload = "deltas"\nserver_beta2 = 0.9\n[training]\nsteps = 2', "method.server_beta2"),
    ("a bound for gradients", DEFT + "[rounds]\nupdate_norm_bound = 5", "rounds.update_norm_bound"),
    ("a way to share nothing", DEFT + 'sharing = "hard"', "method.sharing"),
    ("adapters of whole layers", DEFT + 'trains = "full"\n[lora]\nrank = 4', "lora.rank"),
    ("a solver of no name", DEFT + 'solver = "best"', "method.solver"),
]


@pytest.mark.parametrize(("text", "path"), [rule[1:] for rule in DEFT_RULES], ids=[rule[0] for rule in DEFT_RULES])
def test_a_setting_that_deft_has_no_use_for_is_the_only_complaint(text: str, path: str) -> None:
    found = complaints_of(text)
    assert list(found) == [path]
    assert found[path].remedy


def test_a_round_of_gradients_is_one_step_with_the_decay_of_adamw() -> None:
    spec = jobspec.parse(DEFT)
    assert (spec.training.steps, spec.training.epochs) == (1, 0.0)
    assert (spec.method.layout, spec.method.payload, spec.method.server_beta2) == ("blocks", "gradients", 0.999)
    assert jobspec.parse(CLASSIFICATION).method.server_beta2 == 0.99


def test_auto_is_deft_with_the_layout_left_open() -> None:
    spec = jobspec.parse(CLASSIFICATION + '[method]\nname = "auto"\nsolver = "exact"\nrotate_rounds = 3')
    assert (spec.method.name, spec.method.layout) == ("deft", "auto")


def test_whole_numbers_do_for_fractions_but_not_the_other_way_round() -> None:
    assert jobspec.parse(CLASSIFICATION + "[lora]\nalpha = 4").lora.alpha == 4.0
    assert list(complaints_of(CLASSIFICATION + "[lora]\nrank = 4.0")) == ["lora.rank"]


_KEYS = st.sampled_from([*jobspec.section_models(), "rank", "labels", "name", "kind", "text", "steps", "x y", ""])
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["echo", "causal-lm", "org/name", "devices"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08X}" for c in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return "1" if value is None else repr(value)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6))
def test_no_document_raises_anything_but_complaints(document: dict[str, object]) -> None:
    _parse_quietly("\n".join(f"{_toml(key)} = {_toml(value)}" for key, value in document.items()))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_raises_anything_but_complaints(text: str) -> None:
    _parse_quietly(text)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_change_of_a_right_job_raises_anything_but_complaints(data: st.DataObject) -> None:
    text = JOBS.joinpath("text-classification.toml").read_text("utf-8")
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 30))
    _parse_quietly(text[:at] + data.draw(st.text(max_size=6)) + text[at + cut :])


def _parse_quietly(text: str) -> None:
    complaints: list[Complaint] = []
    try:
        jobspec.parse(text)
    except JobFileError as error:
        complaints = error.complaints
    assert all(complaint.remedy for complaint in complaints)
