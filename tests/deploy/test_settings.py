"""Settings: file, environment, flags, the later wins; whatever is wrong is one line that names the place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.settings import Settings, dump, load
from embedding_store.errors import UsageError
from embedding_store.secret import Secret


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(text: str) -> Path:
    path = Path("headrace.toml")
    path.write_text(text)
    return path


def test_the_later_source_wins() -> None:
    written('data_dir = "a"\nbootstrap = "f:1"\n[join]\nwait_ms = 1\nopen_ms = 50\ndisorder_ms = 3\n')
    environment = {"HEADRACE_JOIN_WAIT_MS": "10", "HEADRACE_JOIN_OPEN_MS": "60", "HEADRACE_BOOTSTRAP": "e:1"}
    settings = load(None, environment, {"join.wait_ms": 20, "bootstrap": None})
    join = settings.join.join
    assert (join.wait_ms, join.open_ms, join.disorder_ms) == (20, 60, 3)
    assert settings.bootstrap == "e:1"
    assert settings.data_dir == Path("a")


def test_without_a_file_everything_has_a_default() -> None:
    settings = load()
    assert settings.data_dir == Path(".headrace")
    assert settings.bootstrap == ""
    assert settings.demo.seconds == 120


def test_what_parts_share_is_set_once_and_reaches_the_worker() -> None:
    written('bootstrap = "127.0.0.1:9"\ndata_dir = "state"\n[topics]\nprefix = "x."\n')
    worker = load().join
    assert (worker.bootstrap, worker.data_dir, worker.topics.events) == ("127.0.0.1:9", Path("state"), "x.events")


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("HEADRACE_DEMO_SECONDS", "2.5", 2.5),
        ("HEADRACE_DEMO_PORT", "81", 81),
        ("HEADRACE_DEMO_KEEP", "true", True),
        ("HEADRACE_DEMO_KEEP", "0", False),
        ("HEADRACE_DEMO_LOG", "taobao", "taobao"),
        ("HEADRACE_DEMO_PATH", "12", "12"),
    ],
)
def test_the_environment_is_text_and_becomes_the_type_of_the_setting(variable: str, text: str, value: object) -> None:
    demo = load(None, {variable: text}).demo
    assert getattr(demo, variable.removeprefix("HEADRACE_DEMO_").lower()) == value


@pytest.mark.parametrize(
    ("text", "environment", "flags", "message"),
    [
        ("[join]\nwait_m = 1", {}, {}, "headrace.toml: join.wait_m is not a setting; did you mean join.wait_ms?"),
        ("[jion]\nwait_ms = 1", {}, {}, "headrace.toml: jion is not a setting; did you mean join?"),
        ("[join]\nbootstrap = 'x'", {}, {}, "headrace.toml: join.bootstrap is not a setting"),
        ("join = 3", {}, {}, "headrace.toml: join is a section: write [join] and its settings below"),
        ("[join]\nwait_ms = 'soon'", {}, {}, "headrace.toml: join.wait_ms = 'soon': expected int, got str"),
        ("[join]\nwait_ms = -1", {}, {}, "headrace.toml: join.wait_ms = -1: expected int >= 0"),
        ("[join\n", {}, {}, "headrace.toml: not valid TOML"),
        ("data_dir = 3", {}, {}, "headrace.toml: data_dir = 3: expected Path, got int"),
        (
            "",
            {"HEADRACE_JOIN_WAIT_M": "1"},
            {},
            "HEADRACE_JOIN_WAIT_M is not a setting; did you mean HEADRACE_JOIN_WAIT_MS?",
        ),
        ("", {"HEADRACE_DATADIR": "1"}, {}, "HEADRACE_DATADIR is not a setting; did you mean HEADRACE_DATA_DIR?"),
        ("", {"HEADRACE_JOIN_WAIT_MS": "soon"}, {}, "HEADRACE_JOIN_WAIT_MS=soon: expected int, got str"),
        ("", {}, {"join.wait_ms": -1}, "join.wait_ms = -1: expected int >= 0"),
        (
            "[join]\nwait_ms = 9\nopen_ms = 5",
            {},
            {},
            "settings in [join]: `wait_ms` (9) must not be longer than `open_ms` (5)",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_place(
    text: str, environment: dict[str, str], flags: dict[str, object], message: str
) -> None:
    written(text)
    with pytest.raises(UsageError) as refused:
        _ = load(None, environment, flags).join
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_log_lines_are_set_for_all_workers_and_headrace_log_is_not_the_section_log() -> None:
    settings = load(None, {"HEADRACE_LOG": "json", "HEADRACE_LOG_FORMAT": "taobao"})
    assert {settings.logs, settings.join.logs, settings.train.logs, settings.serve.logs} == {"json"}
    assert settings.log.format == "taobao"
    assert load(None, {}, {"logs": "text"}).join.logs == "text"
    with pytest.raises(UsageError, match=r"logs = 'xml': expected text or json$"):
        load(None, {}, {"logs": "xml"})


def test_which_values_there_are_is_said_where_there_are_a_few() -> None:
    written('[log.columns]\nkinds = {view = "klick"}\n')
    with pytest.raises(UsageError, match=r"\{'view': 'klick'\}: expected click or watch or .* or ignore - at "):
        _ = load().log
    with pytest.raises(UsageError, match=r"^HEADRACE_LOG_COLUMNS_POSITION_FROM=2: expected 0 or 1$"):
        _ = load(written(""), {"HEADRACE_LOG_COLUMNS_POSITION_FROM": "2"}).log


def test_a_named_file_must_be_there() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: No such file or directory; check"):
        load(Path("nowhere.toml"))


def test_the_commands_own_variables_are_no_settings() -> None:
    load(None, {"HEADRACE_DEBUG": "1", "HEADRACE_CACHE": "/x", "HOME": "/"})


def test_what_is_written_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    flags = {
        "join.wait_ms": 77,
        "demo.log": 'a "quoted"\nname',
        "data_dir": str(tmp_path / 'x"y'),
        "topics.prefix": "p.",
    }
    settings = load(None, {"HEADRACE_SIMULATOR_SEED": "9"}, flags)
    text = dump(settings)
    written(text)
    again = load()
    assert again.data_dir == settings.data_dir
    for section in Settings.SECTIONS:
        assert getattr(again, section) == getattr(settings, section), section
    assert "wait_ms = 77" in text
    assert "# path is not set" in text


ARMS = """
[serve]
experiment = "may"
[[serve.arms]]
name = 'of "quotes"'
share = 0.25
scoring = {click = 2.0, price_power = 0.5}
[[serve.arms]]
name = "bold"
share = 0.5
exploration = {policy = "thompson", seed = 4}
reranking.seller_cap = 2
[serve.policy.video]
watch = 3
"""


def test_arms_are_lists_in_the_file_and_in_the_environment_and_read_back_as_they_were() -> None:
    settings = load(written(ARMS))
    replica = settings.serve.serve
    assert [(arm.name, arm.share) for arm in replica.arms] == [('of "quotes"', 0.25), ("bold", 0.5)]
    assert (replica.arms[0].scoring.click, replica.arms[0].scoring.watch, replica.arms[0].reranking) == (2, 0.5, None)
    assert (replica.arms[1].exploration.policy, replica.arms[1].reranking.seller_cap) == ("thompson", 2)
    assert (replica.policy.video.watch, replica.policy.shelf.watch) == (3, 0.5)
    assert load(written(dump(settings))).serve.serve == replica
    assert dump(load(written(dump(settings)))) == dump(settings)
    environment = {"HEADRACE_SERVE_ARMS": '[{name = "a", share = 1}]', "HEADRACE_SERVE_POLICY_EXPLORATION_EPSILON": "0"}
    replica = load(written(ARMS), environment).serve.serve
    assert [(arm.name, arm.share) for arm in replica.arms] == [("a", 1.0)]
    assert (replica.policy.exploration.epsilon, replica.policy.video.watch) == (0, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('arms = [{name = "a", share = 0.6}, {name = "b", share = 0.5}]', "the shares of the arms are 1.1 together"),
        ('arms = [{name = "a", share = 0.6}, {name = "a", share = 0.1}]', "two arms have one name: a, a"),
        ('arms = [{name = "a", shar = 0.6}]', "serve.arms"),
        ("policy.shelf.price_power = 2", "serve.policy.shelf.price_power = 2: expected"),
    ],
)
def test_arms_that_cannot_be_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        _ = load(written(f"[serve]\n{text}\n")).serve
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_join_worker_never_waits_for_torch() -> None:
    program = (
        "import sys, streams.join_worker; from deploy.settings import load; "
        "s = load(None, {'HEADRACE_JOIN_WAIT_MS': '5'}, {'bootstrap': 'a:1', 'train.threads': 1}); "
        "s.join; s.topics; s.simulator; s.demo; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def test_the_trainer_knows_how_long_the_joiner_waits_for_purchases() -> None:
    written('[join]\npurchase_wait_ms = 60000\n[model]\nfeedback = "elapsed"\n')
    settings = load()
    settings.check()
    assert (settings.model.purchase_wait_ms, settings.train.model.purchase_wait_ms) == (60_000, 60_000)
    written(dump(settings))
    assert load().model == settings.model


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[model]\nfeedback = "elapsed"\n', "needs a join.purchase_wait_ms"),
        ('[join]\npurchase_wait_ms = 5\n[model]\nfeedback = "weighted"\n', "needs join.purchase_wait_ms = 0, it is 5"),
        ('[join]\npurchase_wait_ms = 5\n[model]\nbatch_size = 9\n', "needs join.purchase_wait_ms = 0, it is 5"),
        ('[model]\nfeedback = "none"\npurchase_wait_ms = 5\n', "set it there only"),
    ],
)
def test_a_way_to_learn_purchases_that_does_not_fit_the_joiner_is_refused(text: str, says: str) -> None:
    written(text)
    with pytest.raises(UsageError, match=says) as refused:
        load().check()
    assert "\n" not in str(refused.value)


def test_a_secret_is_set_and_never_shown() -> None:
    token = "t0ken-" + "x" * 20
    settings = load(None, {"HEADRACE_HTTP_TOKEN": token, "HEADRACE_HTTP_HOST": "127.0.0.1"})
    assert settings.serve.http.token == settings.join.http.token == Secret(token)
    text = dump(settings)
    assert "# token is set, and not shown" in text
    assert token not in text + repr(settings.http) + repr(settings.serve)
    written(f'[http]\ntoken = "{token}"\n')
    with pytest.raises(UsageError, match=r"http\.token is a secret: set HEADRACE_HTTP_TOKEN") as error:
        _ = load().http
    assert token not in str(error.value)
