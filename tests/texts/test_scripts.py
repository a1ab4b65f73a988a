"""Texts and files of users are read: any script, hard-wrapped lines, marks that editors leave."""

import json
import textwrap
import time
import unicodedata

import pytest

from experiment.config import load_config
from support.errors import InputError
from texts import personas
from texts.neutral_text import OverlapCheck, load_neutral_texts, unwrapped
from texts.personas import load_persona

# A sentence of about 30 words a language; what varies is a number in it, so that none is there twice.
SENTENCES = {
    "Russian": "Река номер {} течёт мимо старого города, где люди продают хлеб и рыбу почти каждый день, а зимой "
    "они сидят дома у огня и рассказывают детям длинные истории о море и о далёких странах.",
    "French": "Élevée près de la rivière numéro {}, elle vendait du pain et du poisson presque tous les jours de "
    "l'année, et l'hiver elle restait chez elle à raconter aux enfants de longues histoires de mer.",
    "Chinese": "第{}条河流过一座古老的小城，人们几乎每天都在那里卖面包和鱼，到了冬天他们就坐在家里的火炉旁边，"
    "给孩子们讲关于大海和遥远国家的漫长故事，一直讲到深夜才去睡觉。",
    "Japanese": "川の{}番は古い小さな町のそばを流れていて、人々はほとんど毎日そこでパンや魚を売り、冬になると家の"
    "火のそばに座って、子供たちに海や遠い国についての長い話を夜遅くまで聞かせている。",
    "Arabic": "يمر النهر رقم {} بجانب المدينة القديمة حيث يبيع الناس الخبز والسمك كل يوم تقريبا وفي الشتاء يجلسون "
    "في بيوتهم قرب النار ويحكون للأطفال قصصا طويلة عن البحر وعن البلاد البعيدة حتى منتصف الليل؟",
    "Hindi": "नदी संख्या {} पुराने शहर के पास से बहती है जहाँ लोग लगभग हर दिन रोटी और मछली बेचते हैं और सर्दियों में वे घर पर "
    "आग के पास बैठकर बच्चों को समुद्र और दूर के देशों की लंबी कहानियाँ सुनाते हैं।",
    "Georgian": "მდინარე ნომერი {} მიედინება ძველი პატარა ქალაქის გვერდით სადაც ხალხი თითქმის ყოველ დღე ყიდის პურსა და თევზს "
    "ხოლო ზამთარში ისინი სახლში ცეცხლთან სხედან და ბავშვებს გრძელ ამბებს უყვებიან ზღვაზე და შორეულ ქვეყნებზე.",
    "Tibetan": "གཙང་པོ་{}ནི་གྲོང་ཁྱེར་རྙིང་པའི་འགྲམ་ནས་རྒྱུག་ཅིང་མི་རྣམས་ཀྱིས་ཉིན་ལྟར་བག་ལེབ་དང་ཉ་འཚོང་ཞིང་དགུན་ཁར་ཁྱིམ་དུ་མེའི་འགྲམ་ལ་བསྡད་ནས་"
    "ཕྲུ་གུ་རྣམས་ལ་རྒྱ་མཚོ་དང་ཡུལ་ཐག་རིང་གི་སྒྲུང་རིང་པོ་བཤད་ཀྱི་ཡོད།",
    "Thai": "แม่น้ำสายที่{}ไหลผ่านเมืองเล็กเก่าแก่ที่ผู้คนขายขนมปังและปลาเกือบทุกวันและในฤดูหนาวพวกเขานั่งอยู่ที่บ้านข้างกองไฟ"
    "และเล่าเรื่องยาวเกี่ยวกับทะเลและประเทศที่ห่างไกลให้เด็กฟังจนดึก",
}


@pytest.fixture(params=["txt", "jsonl"])
def written(request, tmp_path):
    """A function that writes texts to a file, whose path it returns."""

    def written(texts, encoding="utf-8", line_end="\n"):
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        whole = "\n\n".join(texts) if request.param == "txt" else "\n".join(rows)
        path = tmp_path / f"text.{request.param}"
        path.write_text(whole, encoding, newline=line_end)
        return str(path)

    return written


@pytest.mark.parametrize("language", SENTENCES)
def test_text_of_any_script_gives_passages(written, language):
    paragraphs = [SENTENCES[language].format(number) for number in range(100, 160)]
    texts = [item.text for item in load_neutral_texts(written(paragraphs), 60)]
    assert len(set(texts)) == 60
    for text in texts:
        (whole,) = (paragraph for paragraph in paragraphs if paragraph.startswith(text))
        assert 10 <= len(text) < len(whole)
    lengths = sorted(map(len, texts))
    assert lengths[-1] > 1.5 * lengths[0]  # they vary


@pytest.mark.parametrize(("language", "width"), [("French", 60), ("Chinese", 25)])
def test_hard_wrapped_lines_are_one_paragraph(written, language, width):
    paragraphs = [SENTENCES[language].format(number) for number in range(40)]
    text = "\n\n".join("\n".join(textwrap.wrap(paragraph, width)) for paragraph in paragraphs)
    for item in load_neutral_texts(written([text]), 40):
        assert any(paragraph.startswith(item.text) for paragraph in paragraphs)


def test_lines_that_are_paragraphs_or_headings_are_not_joined():
    first = "A first paragraph of some length that ends here."
    second = "A second one that is as long and ends, too."
    for text in (f"{first}\n{second}", f"History\n{first}", f"{first}\n{second}\n{first}", first, ""):
        assert unwrapped(text) == text
    assert unwrapped(f"{first}\n\n{second}") == f"{first}\n{second}"


@pytest.mark.parametrize("marks", [("utf-8-sig", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\r")], ids=ascii)
def test_marks_of_editors_are_no_part_of_neutral_text(written, marks):
    paragraphs = [SENTENCES["French"].format(number) for number in range(20)]
    assert len(load_neutral_texts(written(paragraphs, *marks), 20)) == 20


def test_a_mark_before_configuration_and_persona_is_ignored(tmp_path, monkeypatch):
    config = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 1}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert load_config(tmp_path / "config.json").source_model == "a"
    content = (personas.PERSONA_FOLDER / "formal.json").read_text(encoding="utf-8")
    (tmp_path / "formal.json").write_text(content, encoding="utf-8-sig")
    expected = load_persona("formal")
    monkeypatch.setattr(personas, "PERSONA_FOLDER", tmp_path)
    assert load_persona("formal") == expected


def test_thousands_of_passages_of_one_paragraph_take_seconds(tmp_path):
    """Copying the rest of the paragraph for each passage would take minutes."""
    sentences = [SENTENCES["French"].format(number) for number in range(20_000)]
    (tmp_path / "text.txt").write_text(" ".join(sentences), encoding="utf-8")
    started = time.perf_counter()
    assert len(load_neutral_texts(str(tmp_path / "text.txt"), 5000)) == 5000
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_persona_text_inside_a_paragraph_is_found_in_every_script(language, form):
    persona = SENTENCES[language].format(7)[10:]
    paragraph = f"{SENTENCES[language].format(8)[:-1]} {SENTENCES[language].format(9)}"
    check = OverlapCheck([unicodedata.normalize(form, persona), "我认为"])
    assert check.found_in(paragraph)
    others = [text.format(8) for name, text in SENTENCES.items() if name != language]
    assert not any(map(check.found_in, [*others, "我认为今天的天气非常好，我们应该去公园散步。"]))


def test_words_with_vowel_signs_are_whole_words():
    """Six words are shared, fewer than eight; their syllables would be more."""
    shared = "पुराने शहर के पास से बहती"
    check = OverlapCheck([f"{shared} नदी हमेशा शांत रहती है।"])
    assert not check.found_in(f"वह सड़क {shared} हवा की तरह थी।")


def test_paragraphs_that_are_no_text_are_left_out(tmp_path):
    good = [SENTENCES["French"].format(number) for number in range(3)]
    bad = [SENTENCES["French"].format(mark) for mark in ("\0", "\x1b[2J", "\ud83d", "\x7f")]
    rows = [{"text": "\ufeff" + text, "id": "\ud83d"} for text in good] + [{"text": text} for text in bad]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_neutral_texts(str(tmp_path / "text.jsonl"), 3)
    assert all(any(text.startswith(item.text) for text in good) for item in found)
    assert {item.document for item in found} == {"\\ud83d"}
    with pytest.raises(InputError, match="gives 3 passages"):
        load_neutral_texts(str(tmp_path / "text.jsonl"), 4)
