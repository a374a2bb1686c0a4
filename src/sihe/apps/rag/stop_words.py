"""Words that say nothing about what a text is about: articles, pronouns, question words.

The words of asking (what is the *difference* between …, 请*介绍*一下 …) say something in a text, nothing in a question.
"""

_EN = """
a about above after again against all am an and any are as at be because been before being below between both but
by can cannot could did do does doing down during each few for from further had has have having he her here hers
herself him himself his how i if in into is it its itself just me more most my myself no nor not now of off on once
only or other our ours ourselves out over own same she should so some such than that the their theirs them
themselves then there these they this those through to too under until up very was we were what when where which
while who whom why will with would you your yours yourself yourselves
"""

_ZH = """
的 了 是 在 和 与 及 或 而 也 都 就 还 又 很 把 被 让 给 对 对于 从 到 向 由 为 为了 以 于 之 其 这 那 这个 那个
这些 那些 它 它们 他 她 我 你 我们 你们 他们 有 没有 不 会 能 能够 可以 要 应 应该 需要 什么 怎么 怎样 如何 为什么
为何 哪 哪些 哪个 哪里 谁 多少 几 吗 呢 吧 啊 请 请问 一个 一种 一些 这样 那样 时候 时 里 上 下 中 后 前 各 每 并
且 但 但是 所以 因此 因为 如果 则 只 才 再 更 最 等 等等 着 过 地 得 个 种 是否 怎么办 如何才能 分别
"""

_ASKING = """
account describe difference differences differ different explain example examples give happen happens list many mean
means meaning much name often tell use used using work works
区别 差别 不同 差异 介绍 一下 解释 说明 描述 意思 含义 定义 是什么 怎么回事 怎么样 例子 举例 告诉 工作 原理 用 做 选 办
有何 起到 用来
"""

STOP_WORDS_EN = frozenset(_EN.split())
STOP_WORDS_ZH = frozenset(_ZH.split())
ASKING_WORDS = frozenset(_ASKING.split())
