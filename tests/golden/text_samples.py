"""Seeds for the text goldens: our own sentences in many scripts, and the odd characters that tokenizers trip over."""

PROSE = [
    "The answer was not in the first chapter, and it wasn't in the last one either.",
    "She'd have told you that they're late, but we'll never know what he'd've said.",
    "In 1997 the harbour shipped 1,204,113 tonnes; by 2024 it was 3,581,990.5 tonnes.",
    "DON'T SHOUT, I'M RIGHT HERE AND IT'S ONLY 7:45 O'CLOCK!",
    "A long prompt is read once, and most of what was read is never looked at again.",
    "entropy decides how much of the past each head reads, segment by segment",
    "Prices rose from $12.99 to $14.49 (+11.5%), i.e. more than anyone had expected...",
    "\"Quoted,\" she wrote, 'and quoted again' -- with dashes - and \u2014 more \u2014 dashes.",
    "e-mail: someone@example.org, see https://example.org/a/b?c=d&e=f#g for details",
    "The quick brown fox jumps over the lazy dog; the dog, being lazy, lets it.",
    "Once the pages are returned to the pool, the next request may take them.",
    "First, wash the rice. Second, soak it for 30 minutes. Third, cook it slowly.",
]

CODE = [
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    "\tif (x == nullptr) return absl::InvalidArgumentError(\"x\");",
    "def f(x, *args, **kwargs):\n    return {k: v for k, v in kwargs.items() if k not in args}",
    "SELECT id, name FROM users WHERE age >= 18 AND name LIKE 'A%' ORDER BY id;",
    "#include <vector>\n\ntemplate <typename T>\nclass Stack {\n public:\n  void Push(T x);\n};",
    "const re = /^[\\w.-]+@[\\w-]+\\.[a-z]{2,}$/i; // mail",
    "fn main() -> Result<(), Box<dyn Error>> { println!(\"{:?}\", 0xFF_u8); Ok(()) }",
    "<div class=\"a b\"><p>text &amp; more</p></div>",
    "{\"a\": [1, 2.5e-10, null, true], \"b\": {\"c\": \"\\u00e9\"}}",
    "x = (a+b)*c/d%e**f//g&h|i^~j<<k>>l",
    "git commit -m \"fix\" && make -j8 2>&1 | tee build.log",
    "        return self.__dict__['_value'] if self._ok else None  # noqa: E501",
]

SCRIPTS = {
    "latin": ["Ça va très bien, merci à tous les élèves du collège.", "Größe, Straße, Übermut und ſchön", "İstanbul'da ılık bir gün, ağaç ve çiçek", "Příliš žluťoučký kůň pěl ďábelské ódy."],
    "vietnamese": ["Hôm nay trời đẹp, chúng tôi đi dạo quanh hồ.", "Người ta nói tiếng Việt ở đây."],
    "greek": ["Σήμερα ο καιρός είναι πολύ καλός.", "ΟΔΟΣ Ὀδυσσεύς"],
    "cyrillic": ["Сегодня хорошая погода, и мы идём гулять.", "Щука й їжак: ґава."],
    "armenian": ["Այսօր եղանակը լավ է։"],
    "georgian": ["დღეს კარგი ამინდია."],
    "hebrew": ["היום מזג האוויר נעים מאוד.", "שָׁלוֹם"],
    "arabic": ["الطقس جميل اليوم ونحن نمشي.", "٠١٢٣٤٥٦٧٨٩ ۱۲۳"],
    "devanagari": ["आज मौसम बहुत अच्छा है।", "क्षत्रिय ज्ञान १२३४"],
    "bengali": ["আজ আবহাওয়া খুব ভালো।"],
    "gurmukhi": ["ਅੱਜ ਮੌਸਮ ਚੰਗਾ ਹੈ।"],
    "gujarati": ["આજે હવામાન સારું છે."],
    "tamil": ["இன்று வானிலை நன்றாக உள்ளது."],
    "telugu": ["ఈ రోజు వాతావరణం బాగుంది."],
    "kannada": ["ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ."],
    "malayalam": ["ഇന്ന് കാലാവസ്ഥ നല്ലതാണ്."],
    "sinhala": ["අද කාලගුණය හොඳයි."],
    "thai": ["วันนี้อากาศดีมาก ๑๒๓"],
    "lao": ["ມື້ນີ້ອາກາດດີ."],
    "khmer": ["ថ្ងៃនេះអាកាសធាតុល្អ។"],
    "burmese": ["ဒီနေ့ ရာသီဥတု ကောင်းတယ်။"],
    "tibetan": ["དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག"],
    "amharic": ["ዛሬ አየሩ ጥሩ ነው።"],
    "chinese": ["今天天气很好，我们去公园散步。", "長文閱讀需要很多記憶體。", "第３章：１２３４５６"],
    "japanese": ["今日は天気がいいですね。", "カタカナとﾊﾝｶｸとひらがな", "プログラムを㌔で測る"],
    "korean": ["오늘은 날씨가 아주 좋습니다.", "한국어 문장 띄어쓰기"],
    "mongolian": ["\u182e\u1823\u1829\u182d\u1823\u182f \u180e \u1821"],
    "cherokee": ["ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ"],
}

EMOJI = [
    "😀 😃😄", "👩‍👩‍👧‍👦 family", "🏳️‍🌈🏴‍☠️", "👍🏽👎🏿", "🇩🇪🇯🇵🇧🇷", "❤️‍🔥", "1️⃣2️⃣#️⃣", "🤷🏼‍♀️ ok", "🧑‍💻 codes 24/7",
]

# Characters where libraries, patterns and Unicode versions like to differ.
ODD = [
    "\u00a0", "\u1680", "\u2003", "\u2009", "\u200a", "\u200b", "\u200d", "\u2028", "\u2029", "\u202f", "\u205f",
    "\u3000", "\u0085", "\u180e", "\u000b", "\u000c", "\u001c", "\u001f", "\u0000", "\u007f", "\ufeff", "\ufffd",
    "\u00ad", "\u0301", "\u0323", "e\u0301", "a\u0323\u0302", "a\u0302\u0323", "\u1e9b\u0323", "\u212b", "\u2126",
    "\ufb01", "\uff21\uff22", "\u00bd", "\u00b2", "\u2167", "\u2460", "\u0e33", "\u1100\u1161\u11a8", "\uac00\u11a8",
    "\u0958", "\u2adc", "\ud7a3", "'\u017f", "'\u212a", "\u0130", "\U0001d173\U0001d165", "\U0001d15e", "\u0f73",
    "\u0344", "\U00010330", "\U0002f800", "\u02bc", "\u2019s", "'S", "'T", "'LL", "'Ve", "\u2581", "_\u2581 \u2581",
    "\r\n", "\n\n", " \n ", "\t\t", "\r", " \r\n\t",
]

# Not UTF-8: overlong forms, surrogates, truncated sequences, stray and impossible bytes.
BROKEN = [
    b"\x80", b"\xff", b"\xfe\xff", b"abc\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82x", b"\xe2(\xa1", b"\xf0\x9f\x98",
    b"\xf0\x9f\x98 x", b"\xf0\x28\x8c\xbc", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xed\xa0\x80",
    b"\xed\xbf\xbf\xed\xb0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"caf\xe9 au lait", b"\xbf\xbf\xbf",
    b"ok \xe4\xb8 \xe4\xb8\xad \xb8\xad", b"\xc3\xa9\xc3\xc3\xa9", b"\xf1\x80\x80\xe1\x80\xc2",
]
