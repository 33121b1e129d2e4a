"""Thirty-two prompts for small instruction models: eight each to summarise, extract, edit code, chat."""

NOTES = (
    "The harbour of Lindow was dredged in March. The work took nineteen days and cost 2.4 million "
    "crowns. Two ferries now call each morning, and the fish market has moved to the north quay.",
    "Maple syrup is boiled from sap that is collected in early spring, when nights freeze and days "
    "thaw. About forty litres of sap give one litre of syrup. Darker syrup is made later in the season.",
    "The library will close at noon on Friday for repairs to the roof. Books due that day can be "
    "returned on Monday without a fee. The reading room on the ground floor stays open.",
    "Our train left Oslo at 7:20 and reached Bergen at 14:05. Snow on the plateau delayed it by half "
    "an hour. The dining car served soup and bread, and the view over the lakes was clear.",
    "The new router supports three radio bands and up to sixty devices. It is set up with a phone. The "
    "guest network is off by default, and updates are installed at night.",
    "Bees visited the lavender plot 212 times in one hour, the clover plot 148 times and the mown lawn "
    "six times. The counts were made on three sunny days in June by two observers.",
    "The committee met on Tuesday. It approved the budget for the school garden, postponed the vote on "
    "bus routes, and asked Ms Okafor to report on the price of solar panels by May.",
    "A comet will be visible in the western sky after sunset from the tenth to the twentieth. It will "
    "be brightest on the fourteenth. Binoculars help, but a dark place matters more.",
)

CODES = (
    "def area(width, height):\n    result = width * height\n    return result",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)",
    "class Counter:\n    def __init__(self):\n        self.count = 0\n\n    def step(self):\n        self.count += 1",
    "def read_lines(path):\n    file = open(path)\n    lines = file.readlines()\n    file.close()\n    return lines",
    "def is_even(number):\n    if number % 2 == 0:\n        return True\n    else:\n        return False",
    "def largest(items):\n    best = items[0]\n    for item in items:\n        if item > best:\n            best = item\n    return best",
    "def greet(name, greeting='Hello'):\n    message = greeting + ', ' + name + '!'\n    print(message)",
    "def celsius(fahrenheit):\n    difference = fahrenheit - 32\n    return difference * 5 / 9",
)

EDITS = (
    "Rename result to surface.",
    "Rename total to running_sum.",
    "Rename count to steps.",
    "Rename lines to rows.",
    "Rename number to value.",
    "Rename best to winner.",
    "Rename message to text.",
    "Rename difference to offset.",
)

QUESTIONS = (
    "Why is the sky blue?",
    "Give me three ideas for a quick dinner with rice.",
    "How do I get better at waking up early?",
    "What is the difference between a lake and a pond?",
    "Write a short poem about a lighthouse.",
    "Explain what a variable is to a ten-year-old.",
    "What should I pack for a weekend in the mountains?",
    "Tell me something surprising about octopuses.",
)

PROMPTS = {
    "summarise": [f"Summarise in one or two sentences:\n\n{note}" for note in NOTES],
    "extract": [
        f"Copy every sentence that holds a number from this text, word by word:\n\n{n}"
        for n in NOTES
    ],
    "code": [
        f"{edit} Answer with the whole code.\n\n```python\n{code}\n```"
        for edit, code in zip(EDITS, CODES, strict=True)
    ],
    "chat": list(QUESTIONS),
}
"""Kind of task to eight user messages."""

COPY_HEAVY = ("summarise", "extract", "code")
