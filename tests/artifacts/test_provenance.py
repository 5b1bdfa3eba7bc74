import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleot_ray.artifacts.provenance import (
    LICENCE_LIMIT,
    NAME_LIMIT,
    check_licence,
    check_model_name,
    licence_files,
    licence_notice,
    model_name,
)
from scaleot_ray.errors import ArtifactRefused

LONG = "You may.\n" * LICENCE_LIMIT


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("my model (v2) é", "my model (v2) é"),
        ("/home/alice/models/tiny", "tiny"),
        ("../../alice/models/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        ("m`\n# Heading", "m__# Heading"),
        ("x" * 500, "x" * NAME_LIMIT),
        ("..", None),
        ("", None),
    ],
)
def test_names(source, name):
    assert model_name(source) == name


def test_a_long_licence_is_cut_and_its_whole_text_goes_with_the_emulator():
    notice = licence_notice(LONG)
    assert notice.startswith("You may.\nYou may.\n")
    assert notice.endswith("[…] cut here: the whole text is in the file LICENSE of the emulator.")
    assert LICENCE_LIMIT - 100 < len(notice.encode()) <= LICENCE_LIMIT
    assert licence_files(LONG) == {"LICENSE": LONG.encode()}
    assert licence_notice("é" * LICENCE_LIMIT).startswith("éé")


def test_a_short_licence_stays_as_it_is():
    assert licence_notice("\ufeffMIT\r\n\r\n\tDo as you like.\x0cEnd\n") == "MIT\n\n\tDo as you like.\nEnd"
    assert licence_files("MIT") == {}
    assert licence_notice(" \n") is None


def test_half_characters_are_refused():
    with pytest.raises(ArtifactRefused, match=r"licence has the character '.ud800'"):
        check_licence("\ud800")
    with pytest.raises(ArtifactRefused, match=r"base_model has the character '.ud800'"):
        check_model_name("\ud800")


@given(st.text())
def test_what_is_written_passes_what_is_checked(text):
    if (name := model_name(text)) is not None:
        check_model_name(name)
        assert model_name(name) == name
    if (notice := licence_notice(text)) is not None:
        check_licence(notice)
        assert licence_notice(notice) == notice
