"""Files of preference pairs in the schemas of public data sets, 200 rows each, with text of our own.

A row is a subject with facts of its own in a question of one kind; no subject meets a kind twice, in any of the files.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Text = tuple[str, str, str]
"""A question, a good answer and a bad one."""

RISKS = (
    ("open the lock of a neighbour's shed", "it belongs to somebody else", "ask the owner for the key"),
    ("read the messages on my partner's telephone", "it breaks the trust between you", "say openly what worries you"),
    (
        "sell concert tickets that do not exist",
        "the buyers would lose their savings",
        "return real tickets to the box office",
    ),
    ("copy a classmate's essay for tomorrow", "the school treats it as cheating", "ask the teacher for two more days"),
    ("drive home after four glasses of wine", "your reactions are slow for hours", "call a taxi or a sober friend"),
    (
        "skip the prescribed antibiotics halfway",
        "the infection may return stronger",
        "telephone the pharmacist about side effects",
    ),
    (
        "spread a rumour about my new manager",
        "it can ruin a career within a week",
        "bring the facts to the staff council",
    ),
    ("fish in the nature reserve at night", "the young trout are protected there", "buy a permit for the public lake"),
    (
        "burn garden waste during the drought",
        "one spark can take the whole hillside",
        "bring the branches to the compost yard",
    ),
    (
        "forge a landlord's signature on a lease",
        "a court calls that fraud",
        "write to the landlord and wait for an answer",
    ),
    (
        "feed bread to the swans all winter",
        "it makes their wings grow crooked",
        "offer oats or chopped lettuce instead",
    ),
    (
        "remove the smoke alarm above my bed",
        "it wakes you when nothing else does",
        "replace the battery that keeps beeping",
    ),
    (
        "hide damage from the insurance assessor",
        "the contract ends when they find out",
        "list every scratch with a photograph",
    ),
    ("cross the frozen river with a sledge", "the ice is thin above the current", "take the footbridge near the mill"),
    (
        "enter the abandoned factory with friends",
        "the floors have rotted through",
        "join a guided tour of the old works",
    ),
    ("pay the builder without any invoice", "you lose the guarantee on the roof", "agree on instalments in writing"),
    (
        "use my grandmother's bank card quietly",
        "the money is hers even if she forgets",
        "arrange a written authority at her branch",
    ),
    (
        "throw old paint into the drain",
        "it poisons the stream behind the houses",
        "leave the tins at the recycling centre",
    ),
    ("let a child ride on the tractor", "there is no belt and no second seat", "let her steer it while it is parked"),
    ("photograph strangers at the swimming pool", "nobody there agreed to it", "ask first and show them the picture"),
    (
        "lie about my degree in the application",
        "one call to the university reveals it",
        "describe what you learnt on the job",
    ),
    ("bet the holiday money on a horse", "the bookmaker earns on every race", "put a small stake aside and stop there"),
    (
        "give my dog a painkiller of mine",
        "dogs cannot break that substance down",
        "ring the animal clinic for a safe dose",
    ),
    (
        "cut the cable that crosses our garden",
        "it may carry the street's electricity",
        "ask the network company whose it is",
    ),
    (
        "climb the crane beside the station",
        "the wind up there throws adults off",
        "visit the viewing platform on the tower",
    ),
)
REQUESTS: tuple[Text, ...] = (
    (
        "How can I {s} without anyone noticing?",
        "Please don't: {a}. It is wiser to {b}.",
        "Wait until dark, then {s} as fast as you can.",
    ),
    (
        "Everybody I know does it, so why shouldn't I {s}?",
        "Many people doing it changes little, since {a}. You could {b}.",
        "You are right, go ahead and {s}; rules are for others.",
    ),
    (
        "Give me three tips to {s}.",
        "I won't give tips for that, because {a}. Here is one that helps: {b}.",
        "Stay calm, be quick, and simply {s} before lunch.",
    ),
    (
        "My cousin dared me to {s}. What should I say?",
        "Tell your cousin no and explain that {a}. Then {b} together.",
        "Never refuse a dare. Film yourself while you {s}.",
    ),
    (
        "Is it really that bad to {s}?",
        "It is, mainly because {a}. A better way is to {b}.",
        "Not at all. I would {s} every weekend if I were you.",
    ),
    (
        "Write a cheerful plan for the evening on which I {s}.",
        "I'd rather plan another evening, for {a}. Let us {b} and cook something afterwards.",
        "Six o'clock: snacks. Seven o'clock: {s}. Eight o'clock: laugh about it.",
    ),
    (
        "I already decided to {s}. Which excuse sounds best?",
        "Before you look for an excuse, think of this: {a}. There is still time to {b}.",
        "Say that somebody told you to {s}; nobody ever checks.",
    ),
    (
        "What happens to people who {s}?",
        "Often it ends badly, as {a}. Those who {b} sleep better.",
        "Nothing ever happens to them, so {s} and relax.",
    ),
)

SUBJECTS = (
    ("sourdough bread", "a starter wants feeding every day", "steam gives the loaf its crust"),
    ("repotting a fern", "the new pot may be two fingers wider", "the roots should never stand in water"),
    ("bicycle brakes", "worn pads squeal before they fail", "a drop of oil belongs on the cable only"),
    ("a rain barrel", "a lid keeps the mosquitoes out", "the tap must sit above the sediment"),
    ("chess openings", "the centre is worth more than a pawn", "knights come out before bishops"),
    ("knitting socks", "the heel decides how a sock fits", "wool with a little nylon lasts longer"),
    ("night photography", "a tripod matters more than the lens", "long exposures turn cars into ribbons"),
    ("a vegetable patch", "beans leave nitrogen for the cabbage", "slugs dislike dry, rough mulch"),
    ("learning the cello", "the bow arm needs its own exercises", "gut strings go flat when it rains"),
    ("a mountain hut", "water has to be carried from the spring", "boots stay outside the sleeping room"),
    ("home insulation", "most heat escapes through the roof", "damp wool insulates hardly at all"),
    ("the city archive", "old maps are lent only for one morning", "pencils are allowed and pens are not"),
    ("keeping bees", "a hive is calm around noon", "honey below twenty per cent water keeps for years"),
    ("a sailing trip", "the forecast changes twice before breakfast", "reef early and nobody gets wet"),
    ("secondhand books", "the first page often names the owners", "sunlight bleaches red spines first"),
    ("an allotment fence", "posts rot where soil meets air", "larch lasts without any paint"),
    ("telescopes", "the mirror must cool before it shows detail", "a cheap mount ruins a good tube"),
    ("pickled cucumbers", "vine leaves keep them crisp", "brine should cover every piece"),
    ("a village theatre", "the prompter saves every premiere", "costumes are sewn from old curtains"),
    ("a model railway", "dirty rails stop more trains than faults do", "curves need a generous radius"),
    ("pottery glazes", "thick layers run down onto the shelf", "iron turns green without oxygen"),
    ("public speaking", "a pause says more than a joke", "the last sentence is what they remember"),
    ("herbal tea", "mint loses its scent above eighty degrees", "dried roots must simmer for a while"),
    ("marathon training", "most kilometres should feel easy", "sleep repairs what the road breaks"),
    ("restoring chairs", "hot glue is older than any screw", "cane is woven wet and tightens as it dries"),
)
HELPFUL: tuple[Text, ...] = (
    (
        "I have never dealt with {s} before. Where do I begin?",
        "Begin small. In {s}, {a}, and soon you will see that {b}.",
        "Begin anywhere, {s} explains itself if you stare at it.",
    ),
    (
        "Which mistake do beginners make with {s}?",
        "They forget that {a}. Later they also learn that {b}.",
        "Beginners in {s} make no mistakes worth talking about.",
    ),
    (
        "Could you explain {s} to a ten year old?",
        "Imagine a secret with two halves: {a}, and {b}. That is {s} in short.",
        "Ten year olds do not care about {s}, so skip it.",
    ),
    (
        "My budget for {s} is tiny. Is it still worth trying?",
        "Yes. Money changes little here, because {a}; what costs nothing is knowing that {b}.",
        "Without a lot of money {s} is hopeless, buy a television.",
    ),
    (
        "How much time does {s} take in an ordinary week?",
        "Two quiet hours are enough if you accept that {a}. In busy weeks remember that {b}.",
        "Exactly nine minutes, whatever {s} may be.",
    ),
    (
        "Recommend a first weekend project around {s}.",
        "On Saturday test for yourself that {a}. On Sunday write down why {b}.",
        "Finish everything about {s} before Saturday lunch.",
    ),
    (
        "What do experts on {s} disagree about?",
        "They agree that {a}, and quarrel about how often it matters that {b}.",
        "Experts on {s} are all the same person, I believe.",
    ),
    (
        "Why did my grandparents care so much for {s}?",
        "They had seen that {a}; and in hard years it counted that {b}.",
        "Grandparents like {s} because they have no telephones.",
    ),
)
ULTRA: tuple[Text, ...] = (
    (
        "Compose a two-sentence notice about {s} for the library door.",
        "Dear readers, in {s} {a}. Come on Thursday and hear why {b}.",
        "Notice: {s}. Bring nothing, expect nothing, leave early.",
    ),
    (
        "List one advantage and one risk of {s}.",
        "Advantage: you learn that {a}. Risk: ignoring that {b}.",
        "Advantage: {s}. Risk: also {s}, more or less.",
    ),
    (
        "Summarise the essence of {s} in plain words.",
        "In plain words, {a}; everything else follows from the fact that {b}.",
        "The essence of {s} is its essential character, essentially.",
    ),
    (
        "Turn this into advice: people misunderstand {s}.",
        "Take it slowly with {s}. First, {a}. Second, {b}.",
        "If people misunderstand {s}, shout louder at them.",
    ),
    (
        "Invent a riddle whose answer has to do with {s}.",
        "I teach patience: {a}. I reward care: {b}. What am I part of?",
        "What begins with {s} and ends with it? I forgot.",
    ),
    (
        "Which question about {s} would you ask in an interview?",
        "I would ask for the day when they noticed that {a}, and whether it is true that {b}.",
        "I would ask how tall they are, then mention {s}.",
    ),
    (
        "Describe a short film on {s}.",
        "It opens in silence while somebody finds out that {a}. In the last scene we understand that {b}.",
        "An hour of {s} in the dark, without sound or people.",
    ),
    (
        "Translate the charm of {s} into numbers.",
        "Seven parts practice, since {a}; three parts luck, because {b}.",
        "The charm of {s} is forty-two, give or take.",
    ),
)
STEER: tuple[Text, ...] = (
    (
        "Draft a polite message that postpones our course on {s}.",
        "Dear all, the course starts a week later. Meanwhile, notice how {a}, and ask yourselves why {b}.",
        "Course on {s} cancelled forever, do not write back.",
    ),
    (
        "Check this claim: nobody needs to practise {s}.",
        "The claim is wrong: {a}, and only practice shows that {b}.",
        "The claim about {s} is right because it is a claim.",
    ),
    (
        "Compare the old and the new way of {s}.",
        "Both ways respect that {a}. The new one adds that {b}.",
        "The new way of {s} is new and the old one is old.",
    ),
    (
        "What would you teach first in an evening class about {s}?",
        "First I would show that {a}. In the second hour we would test whether {b}.",
        "First the bill, and then {s} if there is time.",
    ),
    (
        "Give me a checklist for {s} with two entries.",
        "One: {a}. Two: {b}.",
        "One: {s}. Two: see the first entry of this list.",
    ),
    (
        "Tell the story of somebody who nearly gave up {s}.",
        "She wanted to stop, until a neighbour told her that {a}. Years later she taught others that {b}.",
        "Somebody gave up {s}. The end, nothing else happened.",
    ),
    (
        "How has the internet changed {s}?",
        "Videos repeat that {a}; forums argue about whether {b}.",
        "The internet replaced {s} completely on a Tuesday.",
    ),
    (
        "Name a proverb that fits {s} and say why.",
        "Haste makes waste fits well: {a}, and besides, {b}.",
        "No proverb fits {s}, proverbs are about cats.",
    ),
)

ZH_SUBJECTS = (
    ("发面馒头", "酵母怕开水烫", "醒面要盖上湿布"),
    ("养兰花", "根部最怕积水", "早晨的阳光最合适"),
    ("修自行车", "链条要先洗净再上油", "刹车片磨薄了就得换"),
    ("学书法", "坐姿端正手腕才稳", "临帖贵在坚持"),
    ("腌咸菜", "坛口必须密封", "盐少了容易发酸"),
    ("爬泰山", "夜里山顶风很大", "石阶下雨后很滑"),
    ("钓鲫鱼", "清晨水温低时鱼爱咬钩", "动静大了鱼会跑"),
    ("拉二胡", "松香不能抹得太多", "换把时手指要放松"),
    ("泡绿茶", "水温八十度就够了", "第一泡不要闷太久"),
    ("种番茄", "侧枝要及时掐掉", "浇水最好避开叶片"),
    ("下象棋", "开局先出车马", "残局里兵卒很值钱"),
    ("做木雕", "顺着纹理下刀", "刀钝了反而容易伤手"),
    ("包粽子", "糯米要提前泡透", "绳子扎紧才不散"),
    ("练太极", "呼吸跟着动作走", "膝盖不要超过脚尖"),
    ("养金鱼", "新水要晒一天再用", "喂得太饱容易生病"),
    ("剪窗花", "纸要叠得整齐", "先剪里面再剪外面"),
    ("逛旧书摊", "周末早上好书最多", "砍价要带着笑脸"),
    ("骑行川藏线", "高原上不能骑得太急", "雨衣要放在最上层"),
    ("酿米酒", "容器一滴油都不能有", "温度高了会变酸"),
    ("放风筝", "线要一点点放出去", "电线附近绝不能放"),
    ("刻印章", "字要反着写在石头上", "青田石最适合新手"),
    ("看星空", "城外的夜空更暗", "眼睛要二十分钟才适应"),
    ("搭鸡舍", "朝南的位置冬天暖和", "铁丝网要埋进土里"),
    ("缝棉被", "棉花要晒得蓬松", "针脚太密会发硬"),
    ("唱京剧", "吊嗓子要在清晨", "水袖靠腰来带动"),
)
ZH_ORCA: tuple[Text, ...] = (
    ("我想学{s}，第一步该做什么？", "先记住一点：{a}。慢慢你会发现，{b}。", "{s}随便弄弄就行，不用学。"),
    ("{s}最常见的错误是什么？", "很多人忘了{a}，也有人不知道{b}。", "做{s}的人从来不会犯错。"),
    ("请用两句话介绍{s}。", "做好这件事，关键在于{a}。另外，{b}。", "{s}就是{s}，没什么可介绍的。"),
    ("朋友说{s}很难，你怎么看？", "其实不难，只要明白{a}，再留心{b}就好。", "你朋友说得对，{s}谁也做不成。"),
    ("下雨天适合{s}吗？", "要看情况，因为{a}；无论什么天气，{b}。", "下雨天除了{s}什么都别做。"),
    ("{s}要花很多钱吗？", "花不了多少，经验比钱重要：{a}，而且{b}。", "{s}至少要卖掉一套房子。"),
    ("为什么老人喜欢{s}？", "他们从年轻时就懂得{a}，也常说{b}。", "老人喜欢{s}是因为太闲了。"),
    ("怎样教孩子{s}？", "先让孩子看到{a}，再让他自己体会为什么{b}。", "孩子学{s}骂几句就会了。"),
)
ZH_MEDICAL: tuple[Text, ...] = (
    ("久坐之后去{s}会伤身体吗？", "活动开了再去就没事。做的时候注意{a}，还有{b}。", "会的，{s}之后三天不能走路。"),
    (
        "我最近失眠，{s}能帮助放松吗？",
        "可以试试，它让人安静下来。记得{a}，同时{b}，睡前一小时停下。",
        "失眠就整夜{s}，不要睡觉。",
    ),
    (
        "高血压的人可以{s}吗？",
        "病情稳定一般可以，量力而行。要知道{a}，并且{b}，不舒服就去看医生。",
        "高血压靠{s}就能根治，停药吧。",
    ),
    ("手腕疼还想继续{s}，怎么办？", "先休息几天，再从轻的做起。别忘了{a}，也别忘了{b}。", "手腕疼说明{s}还不够多。"),
    (
        "孩子对{s}过于着迷，影响吃饭，要紧吗？",
        "定好时间就不要紧。告诉孩子{a}，吃完饭再一起看看为什么{b}。",
        "让孩子别吃饭，专心{s}。",
    ),
    (
        "术后多久能重新{s}？",
        "请按医生的复查结果决定。恢复后慢慢来，{a}，{b}，一次不超过半小时。",
        "手术当天就可以{s}一整天。",
    ),
    (
        "压力大时{s}有科学依据吗？",
        "专注一件小事能让心跳变慢。比如留意{a}，体会{b}，这本身就是放松。",
        "{s}的科学依据是邻居说的。",
    ),
    ("老年人{s}要注意什么？", "注意保暖和休息。尤其是{a}，另外{b}，身边最好有人陪。", "老年人{s}什么都不用注意。"),
)


def texts(subjects: tuple[Text, ...], kinds: tuple[Text, ...]) -> Iterator[Text]:
    """Each subject in each kind of question."""
    for name, first, second in subjects:
        for question, good, bad in kinds:
            said = {"s": name, "a": first, "b": second}
            yield question.format(**said), good.format(**said), bad.format(**said)


def _hh(rows: Iterator[Text]) -> Iterator[dict[str, Any]]:
    """hh-rlhf: two rendered dialogues; every other one has an earlier exchange."""
    for number, (question, good, bad) in enumerate(rows):
        before = f"\n\nHuman: Have you a minute for question {number}?\n\nAssistant: Of course." if number % 2 else ""
        start = f"{before}\n\nHuman: {question}\n\nAssistant:"
        yield {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}


def _ultra(rows: Iterator[Text]) -> Iterator[dict[str, Any]]:
    """UltraFeedback: four completions with ratings of aspects, two kinds of score and what they were made under."""
    for number, (question, good, bad) in enumerate(rows):
        answers = {
            bad: 1.5,
            good: 4.75,
            f"{good.split('. ')[0].rstrip('.')}.": 3.0,
            f"Let me think about that: {bad}": 2.0,
        }
        yield {
            "source": "evol_instruct",
            "instruction": question,
            "models": [f"model-{index}" for index in range(len(answers))],
            "completions": [
                {
                    "annotations": {"helpfulness": {"Rating": str(round(score)), "Rationale": "It says why."}},
                    "custom_system_prompt": "You are a helpful assistant.",
                    "model": f"model-{index}",
                    "principle": "helpfulness",
                    "response": answer,
                    "critique": "It could name an example.",
                    "fine-grained_score": score,
                    "overall_score": score * 2,
                }
                for index, (answer, score) in enumerate(
                    sorted(answers.items(), key=lambda entry: hash_of(number, entry[0]))
                )
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }


def hash_of(number: int, text: str) -> int:
    """An order that is the same on every machine and no order of the scores."""
    return sum(map(ord, text)) * (number + 7) % 101


def _steer(rows: Iterator[Text]) -> Iterator[dict[str, Any]]:
    """HelpSteer3: two responses to a context, and a preference of annotators from -3 to 3."""
    for number, (question, good, bad) in enumerate(rows):
        first_is_better = number % 3 == 0
        first, second = (good, bad) if first_is_better else (bad, good)
        strength = number % 3 + 1
        context = [{"role": "user", "content": question}]
        if number % 4 == 0:
            earlier = [("user", f"Note number {number}, please."), ("assistant", "Gladly, go on.")]
            context = [{"role": role, "content": text} for role, text in earlier] + context
        yield {
            "domain": "general",
            "language": "english",
            "context": context,
            "response1": first,
            "response2": second,
            "overall_preference": -strength if first_is_better else strength,
            "individual_preference": [
                {"score": strength, "reasoning": "It is concrete.", "feedback1": "a", "feedback2": "b"}
            ],
        }


def _orca_zh(rows: Iterator[Text]) -> Iterator[dict[str, Any]]:
    for question, good, bad in rows:
        yield {"系统": "你是一位耐心的助手。", "问题": question, "好的回答": good, "差的回答": bad}


def _medical(rows: Iterator[Text]) -> Iterator[dict[str, Any]]:
    for question, good, bad in rows:
        yield {"conversations": [{"from": "human", "value": question}], "chosen": good, "rejected": bad}


Maker = Callable[[Iterator[Text]], Iterator[dict[str, Any]]]
FILES: dict[str, tuple[Maker, tuple[Text, ...], tuple[Text, ...]]] = {
    "hh_harmless.jsonl.gz": (_hh, RISKS, REQUESTS),
    "hh_helpful.jsonl": (_hh, SUBJECTS, HELPFUL),
    "ultrafeedback.parquet": (_ultra, SUBJECTS, ULTRA),
    "helpsteer3.jsonl": (_steer, SUBJECTS, STEER),
    "orca_zh.csv": (_orca_zh, ZH_SUBJECTS, ZH_ORCA),
    "medicalgpt.jsonl": (_medical, ZH_SUBJECTS, ZH_MEDICAL),
}
"""By file name, what makes the rows of it."""


def write_files(folder: Path) -> list[Path]:
    """Write all files, each in the kind that its name says."""
    for name, (make, subjects, kinds) in FILES.items():
        rows = list(make(texts(subjects, kinds)))
        path = folder / name
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return [folder / name for name in FILES]
