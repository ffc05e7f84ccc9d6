"""Codecs as they are written: what is meant, and what is refused."""

import pytest

from latentds.codecs import make_picture_codec, parse_codec, parse_codecs
from latentds.errors import UnknownNameError


def test_a_list_of_codecs_keeps_order_and_words():
    words = "jpeg:75,jpeg444:50.5,webp@4096,avif,png,sd15,sd15+fp16,tiny+kmeans:16,dcae-f32+sum:3"
    parsed = parse_codecs(words.replace(",", ", "))
    assert ",".join(codec.text for codec in parsed) == words
    assert [codec.family for codec in parsed] == ["picture"] * 5 + ["latent"] * 4
    assert [codec.at_equal_bytes for codec in parsed[:5]] == [False, False, False, True, False]
    assert (parsed[0].quality, parsed[2].max_bytes, parsed[7].quantizer.levels) == (75, 4096, 16)
    assert parsed[3].at(2048).text == "avif@2048"


def test_one_quality_for_all_pictures_and_additive_codes_have_names():
    mean, sums = parse_codecs("avif~4096,tiny+sum:2")
    assert (mean.text, mean.mean_bytes, mean.at_equal_bytes) == ("avif~4096", 4096, False)
    assert make_picture_codec(mean).name == "avif~4096"
    assert (sums.text, sums.quantizer.planes, sums.quantizer.bits) == ("tiny+sum:2", 2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("png~4096", "png~4096: png is lossless"),
        ("avif~0", "at least 1 byte"),
        ("tiny+sum", "'' is no number of code planes"),
        ("tiny+sum:257", "code planes are 1 to 256"),
    ],
)
def test_bytes_and_planes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_codec(text)


def test_int8_is_the_papers_min_max():
    assert parse_codec("sd15+int8") == parse_codec("sd15+int8-minmax")


@pytest.mark.parametrize(
    ("text", "name", "quantizer"),
    [
        ("runs/x+kmeans", "runs/x", "kmeans"),
        ("runs/a+b+kmeans:16", "runs/a+b", "kmeans:16"),
        ("runs+old/x", "runs+old/x", "none"),
        ("runs+kmeans/x", "runs+kmeans/x", "none"),
        ("runs/x:75@2+int8-channel", "runs/x:75@2", "int8-channel"),
        ("org/decoder@v1.2+kmeans", "org/decoder@v1.2", "kmeans"),
        ("./jpeg:75", "./jpeg:75", "none"),
        ("runs/x+kmeans+none", "runs/x+kmeans", "none"),
    ],
)
def test_paths_keep_their_signs(text, name, quantizer):
    codec = parse_codec(text)
    assert (codec.name, codec.quantizer.text) == (name, quantizer)


def test_a_folder_that_is_there_may_have_a_plus_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert parse_codec("a+b").name == "a+b"
    assert parse_codec("a+b+fp16").name == "a+b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jepg:75", "unknown codec 'jepg'; did you mean 'jpeg'.*webp"),
        ("", "unknown codec ''"),
        ("sd15+kmeens", "unknown quantizer 'kmeens'; did you mean 'kmeans'.*rans"),
        ("runs/x+", "unknown quantizer ''"),
        ("sd25+kmeans", "unknown codec 'sd25'.*sd15"),
    ],
)
def test_unknown_names_list_the_known(text, message):
    with pytest.raises(UnknownNameError, match=message):
        parse_codecs(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpeg:0", "qualities of jpeg are 1 to 100"),
        ("jpeg:nan", "qualities of jpeg are 1 to 100"),
        ("jpeg:", "qualities of jpeg are 1 to 100"),
        ("j2k:75", "qualities of j2k are 10 to 60"),
        ("avif:good", "qualities of avif are 0 to 100"),
        ("avif@", "no number of bytes"),
        ("avif@-1", "no number of bytes"),
        ("avif@0", "at least 1 byte"),
        ("png:9", "png is lossless"),
        ("png@9", "png is lossless"),
        ("jpeg+kmeans", "jpeg is a picture format"),
        ("sd15+kmeans:1", "levels are 2 to 256"),
        ("sd15+kmeans:257", "levels are 2 to 256"),
        ("sd15+kmeans:", "no number of levels"),
        ("sd15+int8:16", "only kmeans and kmeans-channel have levels"),
        ("jpeg:75,jpeg:75.0", "jpeg:75 is named twice"),
    ],
)
def test_numbers_out_of_range_say_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        parse_codecs(text)


def test_bytes_left_open_are_not_made_into_a_codec():
    with pytest.raises(ValueError, match="needs a quality or a number of bytes"):
        make_picture_codec(parse_codec("avif"))
