"""Texts and byte strings that break tokenizers, for tests of token bytes and units."""

import random
import unicodedata

CODE = {
    "python": 'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>{8}}" if x % 2 else "π" * -x  # ok\n',
    "c": '#include <stdio.h>\nint main(void){\n\tchar *s = "\\x00\\t%d\\n";\n\treturn printf(s, 0x7fffffff) <= 0;\n}\n',
    "rust": "impl<'a, T: ?Sized> Iterator for It<'a, T> {\n    fn next(&mut self) -> Option<&'a T> { None }\n}\n",
    "javascript": "const f = async (...a) => `${a?.[0] ?? 1_000n}`.replace(/[\\s\\u200b]+/giu, '');\n",
    "go": "func (s *S) Do(ch <-chan int) (err error) {\n\tfor v := range ch {\n\t\ts.n += v\n\t}\n\treturn\n}\n",
    "haskell": "main = mapM_ print $ zipWith3 (\\a b c -> a <> b <$> c) <*> pure [] >>= \\x -> x\n",
    "sql": "SELECT a.\"x y\", COUNT(*) FROM t a LEFT JOIN u ON a.id=u.id WHERE n LIKE '%\\_%' -- note\n",
    "bash": "for f in \"${a[@]}\"; do [[ -n ${f%%.*} ]] && echo $'\\t' \"$(<$f)\" 2>&1 | tr -d '\\r'; done\n",
    "html": '<!DOCTYPE html>\n<p class="a&amp;b">&nbsp;<br/><s>x</s><!-- </p> --></p>\n',
    "css": "a::before{content:'\\201C';margin:-.5em auto!important}@media(max-width:1e3px){*{}}\n",
    "yaml": "a: &x\n  - !!str 1\n  - {b: ~, c: 'it''s'}\n...\n---\n*x : |+\n  text\n\n\n",
    "makefile": "all: $(OBJ:%.o=%.c)\n\t@echo '$$HOME' $@ $<\n\n.PHONY:\tall\n",
    "lisp": "(defmacro m (&rest x) `(list ,@x #'car '(1 . 2) #\\Space))\n",
    "assembly": "_start:\n\tmov\trax, [rbx+8*rcx-0x10]\t; load\n\tjnz\t.L1\n",
    "diff": "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-old\t\n+new  \n \n\\ No newline at end of file",
    "json": '{"a":[1,-2.50e+10,null,true],"\\u00e9\\ud83d\\ude00":{"":"\\\\\\"\\/\\b"},\n  "k" : [ ]}',
    "latex": "\\begin{align*}\n  \\frac{\\partial^2 u}{x_{i}^2} &= \\sum_{k=0}^{\\infty} a_k\\,x^k \\\\\n\\end{align*}",
    "math": "$$\\int_0^1 \\! e^{-x^2}\\,\\mathrm{d}x \\approx 0.746824$$ so \\boxed{\\frac{1}{2}} ∀ε>0 ∃δ: |x|<δ ⇒ ≤≠",
    "markdown": "# T\n\n* a\n\t* b  \n1. c\n\n```py\nx\n```\n| a | b |\n|---|:-:|\n> **q** _i_ ~~s~~ [l](u)\n",
}
SCRIPTS = {
    "chinese": "今天天气很好，我们去公园散步吧。“好的！”她说：价格是３４５元。",
    "japanese": "東京タワーは高さ333メートルです。ガギグゲゴ、ﾊﾟﾋﾟﾌﾟ、ぱぴぷ。",
    "korean": "안녕하세요, 각각의 한국어 문장입니다. ㄱㄴㄷ",
    "arabic": "مَرْحَبًا بِالعَالَم، كيف حالك؟ ١٢٣٤٥ لا إله",
    "hebrew": "שָׁלוֹם עוֹלָם, מה שלומך? 123 אבג",
    "persian": "می‌خواهم کتاب‌ها را بخوانم؛ ۱۲۳",
    "hindi": "नमस्ते दुनिया, क्षत्रिय श्री १२३ है।",
    "bengali": "আমি বাংলায় গান গাই। কোটি",
    "tamil": "வணக்கம் உலகம் கொ கோ",
    "thai": "สวัสดีชาวโลก น้ำตก ๑๒๓ ก็",
    "tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།",
    "burmese": "မင်္ဂလာပါ ကမ္ဘာ",
    "georgian": "გამარჯობა მსოფლიო ႠႡ",
    "amharic": "ሰላም ለዓለም፡፡",
    "russian": "Съешь ещё этих мягких французских булок, да выпей чаю; йЙёЁ",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία ΐΰ ᾳῷ",
    "vietnamese": "Tiếng Việt rất đẹp: ặẫểỗữ",
    "turkish": "İstanbul'da ığdır, Iı İi şçğ",
    "german": "Straße, größer, ẞ, „Zitat“ – und…",
    "french": "Où est l’élève naïf ? « Là-bas », œuvre, ÿ",
    "polish": "Zażółć gęślą jaźń",
    "ligatures": "ﬁﬂﬀ ½ ² ℌ Å Ω ﷺ ㎏ Ⅷ ①",
    "gothic": "𐌲𐌿𐍄 𝔘𝔫𝔦 𝟘𝟙 𓀀 𠜎𠮷",
}
EMOJI = [
    "😀", "👍🏽", "🇩🇪🇯🇵", "🇩", "👩\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈", "🧑🏿\u200d🚀", "❤\ufe0f\u200d🔥", "1\ufe0f\u20e3",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "☺\ufe0e☺\ufe0f",
    "🤷🏻\u200d♀\ufe0f ok", "🫠🫨🪿",
]  # fmt: skip
LOOK_ALIKES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<eos>", "<bos>", "<pad>",
    "<unk>", "<s>", "</s>", "<mask>", "<0x0A>", "<0x00>", "<0xFF>", "<0xE2><0x82>", "[INST]", "[/INST]", "<<SYS>>",
    "[UNK]", "<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused99>", "[multimodal]", "<think>", "</think>",
    "<repo_name>", "<file_sep>", "<empty_output>", "<tool_call>", "<｜end▁of▁sentence｜>",
    "<|IM_END|>", "<|im_end", "< |im_end|>",
]  # fmt: skip
MARKS = ["Ġ", "▁", "Ċ", "ĉ", "č", "Â", "Ń", "##ing", "@@", "</w>", "Ġthe", "▁the", "a▁b", "▁▁", "ĠĊ", "hello▁world Ġ"]
NUMBERS = [
    *("12345678901234567890123"[:n] for n in range(1, 24)), "3.14159265358979", "-1e-9", "6.02E+23", "0x1F", "0b1010",
    "1,000,000.00", "1 234 567", "2024-02-29T23:59:60Z", "192.168.0.1", "1/3", "50%", "$9.99", "#1", "No. 7",
    "٣٫١٤", "१२३", "４２", "x=1;y=22;z=333;w=4444", "The answer is 42", "1+1=2", "10\n20\n300\n", "007",
    "1st 2nd 3rd", "+49 (0)30 123456", "⁻¹", "0" * 50,
]  # fmt: skip
SPACES = [
    *(char * n for char in " \n\t" for n in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 100)),
    *(f"a{char}b" for char in "\u00a0\u0085\u1680\u2003\u2009\u2028\u2029\u202f\u205f\u3000"),
    "\r\n", "\r\n\r\n", "\r", "\n\r", " \n", "\n ", "  x", "x  ", " x ", "\t x\t\n", "a \n \n b", "a\n\n\nb\r\n\tc",
    "\v\f",
]  # fmt: skip
INVISIBLE = (
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u061c\u180e"
    "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2069"  # right-to-left marks and their like
)
RARE = [
    "\u0301", "e\u0301\u0323", "é", "Z\u0351\u0300\u036b\u0344a\u0310l\u0363\u0489g\u0334o\u0362", "\ufffd", "\ufffe",
    "\uffff", "\ue000", "\U000f0000", "\U0010ffff", "\U00040000", "x\U00080000y", "\U00100000", "\u0378", "i\u0307",
    "\u212b", "\u1e9b\u0323", "\u1100\u1161\u11a8", "\ud7a3", "\u0e33", "\u09c7\u09be", "\u0344", "ȷ\u0308", "\ufb2c",
    "\U0001d15e", "\u2126", "\u00bc\u00bd\u00be",
]  # fmt: skip
PLAIN = [
    "", "a", "Hello, world!", "don't can't I'll we've", "ALL CAPS", "camelCaseAndSnake_case", "a" * 1000, "…",
    "'", "\\",
]  # fmt: skip
CONTROLS = [chr(code) for code in (*range(0x20), 0x7F)]


def _mixes(parts: list[str], count: int, seed: int) -> list[str]:
    """Texts glued from random parts, with and without a separator."""
    rng = random.Random(seed)
    return [rng.choice(["", " ", "\n", "\u200d"]).join(rng.sample(parts, rng.randint(2, 6))) for _ in range(count)]


def _hard_texts() -> list[str]:
    texts = [*PLAIN, *CODE.values(), *EMOJI, *LOOK_ALIKES, *MARKS, *NUMBERS, *SPACES, *RARE, *CONTROLS]
    texts += [code.replace("\n", "\r\n").replace("    ", "\t") for code in CODE.values()]
    texts += [unicodedata.normalize(form, text) for text in SCRIPTS.values() for form in ("NFC", "NFD", "NFKD")]
    texts += [f"before {char} after{char}{char}x" for char in CONTROLS]
    texts += [f"say {mark}now, {mark} again" for mark in LOOK_ALIKES]
    texts += [f"wo{char}rd {char}" for char in INVISIBLE]
    texts += ["".join(CONTROLS), INVISIBLE, "".join(EMOJI), "".join(LOOK_ALIKES), "\x00" * 9]
    pool = [text for text in dict.fromkeys(texts) if 0 < len(text) < 60]
    texts += _mixes(pool, 60, seed=0)
    texts.append(("\n".join(_mixes(list(CODE.values()) + list(SCRIPTS.values()), 300, seed=1)) * 2)[:100_000])
    return list(dict.fromkeys(texts))


HARD_TEXTS: list[str] = _hard_texts()
"""Valid texts, all different; the last one has 100,000 characters."""

_MULTI_BYTE = ["é", "ß", "€", "中", "ก", "न", "😀", "𠮷", "👩\u200d👩\u200d👧", "🇩🇪", "e\u0301"]
_INVALID = [
    b"\x80", b"\xff", b"\xfe\xff", b"\xc0\xaf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"\xf0\x28\x8c\x28", b"\xe2\x82", b"\xe2\x82 then text", b"\xc3(", b"\xbf\xbf\xbf",
    b"\xf8\x88\x80\x80\x80", b"\xe4\xb8\xe4\xb8\xad",
]  # fmt: skip

CUT_BYTES: list[bytes] = list(
    dict.fromkeys(
        [
            *(
                (before + char).encode()[:-cut]
                for char in _MULTI_BYTE
                for before in ("", "The price is ", "中文", "x\n")
                for cut in range(1, len(char[-1].encode()))
            ),
            *(before + invalid for invalid in _INVALID for before in (b"", b"abc ", "naïve ".encode())),
        ]
    )
)
"""Byte strings that end in the middle of a character or hold invalid UTF-8; none of them decodes."""
