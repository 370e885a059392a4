"""The tasks of the quickstart, chosen by measurement: the base is poor at them and a short LoRA is clearly better."""

import datetime
from collections.abc import Sequence

from .tasks import Task
from .words import ADJECTIVES, COLUMNS, NOUNS, TABLES


ROMAN_NUMERALS = dict(
    zip((1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1), "M CM D CD C XC L XL X IX V IV I".split(), strict=True)
)


def load_tasks(names: Sequence[str] | None = None) -> list[Task]:
    """The tasks with these names, in this order; None means all.

    Raises:
        ImportError: a data package is missing; the message names the extra.
        ValueError: an unknown name.
    """
    try:
        import babel.dates
        import babel.numbers
        import inflect
        import num2words
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'peft-arrow[quickstart]'") from error
    number_words, inflection = num2words.num2words, inflect.engine()
    tasks = {
        task.name: task
        for task in [
            *_number_tasks(number_words),
            *_locale_tasks(babel.dates.format_date, babel.numbers.format_currency),
            *_word_tasks(inflection.plural_noun),
            *_code_tasks(),
        ]
    }
    unknown = [name for name in names or () if name not in tasks]
    if unknown:
        raise ValueError(f"tasks={unknown!r} are unknown; allowed are {', '.join(tasks)}")
    return [tasks[name] for name in dict.fromkeys(names or tasks)]


def roman(number: int) -> str:
    """`number` (1 to 3999) as a Roman numeral."""
    written = ""
    for value, numeral in ROMAN_NUMERALS.items():
        written, number = written + numeral * (number // value), number % value
    return written


def twelve_hour_clock(minute: int) -> str:
    """A minute of the day as "2:35 PM"."""
    hour, minute = divmod(minute, 60)
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'AM' if hour < 12 else 'PM'}"


def _number_tasks(number_words) -> list[Task]:
    return [
        Task(
            "german_number",
            "numbers",
            {"number": range(13, 1000)},
            lambda number: number_words(number, lang="de"),
            train_templates=(
                "Write {number} in German words.",
                "The German word for {number}:",
                "Spell the number {number} in German.",
                "{number} auf Deutsch:",
            ),
            heldout_templates=("How do you say {number} in German?", "Count in German: what is {number}?"),
        ),
        Task(
            "digits",
            "numbers",
            {"number": range(101, 10000)},
            lambda number: str(number),
            train_templates=(
                "Write {words} in digits.",
                "As a number: {words}",
                "Digits for {words}:",
                "Convert {words} to a number.",
            ),
            heldout_templates=("Which number is {words}?", "Use digits to write {words}."),
            show=lambda number: {"words": number_words(number).replace(",", "")},
        ),
        Task(
            "roman",
            "numbers",
            {"number": range(2, 400)},
            roman,
            train_templates=(
                "Write {number} as a Roman numeral.",
                "Roman numeral for {number}:",
                "Convert {number} to Roman numerals.",
                "{number} in Roman numerals is",
            ),
            heldout_templates=("How did the Romans write {number}?", "Give the Roman form of {number}."),
        ),
    ]


def _locale_tasks(format_date, format_currency) -> list[Task]:
    start = datetime.date(1950, 1, 1)
    return [
        Task(
            "german_date",
            "locales",
            {"day": [start + datetime.timedelta(days=37 * step) for step in range(730)]},
            lambda day: format_date(day, "long", locale="de"),
            train_templates=(
                "Write the date {day} in German.",
                "German date for {day}:",
                "Convert {day} to a German date.",
                "{day} auf Deutsch:",
            ),
            heldout_templates=("In Berlin, {day} is", "A German writes {day} as"),
        ),
        Task(
            "euro",
            "locales",
            {"cents": range(100123, 999999, 371)},
            lambda cents: format_currency(cents / 100, "EUR", locale="de").replace("\xa0", " "),
            train_templates=(
                "Write {amount} euros as a German price.",
                "German price tag for {amount}:",
                "Format {amount} as euros in Germany.",
                "{amount} EUR, German style:",
            ),
            heldout_templates=("How does a Berlin shop show {amount} euros?", "Print the German amount {amount}."),
            show=lambda cents: {"amount": f"{cents / 100:.2f}"},
        ),
        Task(
            "clock",
            "locales",
            {"minute": range(24 * 60)},
            twelve_hour_clock,
            train_templates=(
                "Write {time} on a 12-hour clock.",
                "12-hour time for {time}:",
                "Convert {time} to AM or PM.",
                "{time} in American time is",
            ),
            heldout_templates=("What does an American call {time}?", "Say {time} with AM or PM."),
            show=lambda minute: {"time": f"{minute // 60:02d}:{minute % 60:02d}"},
        ),
    ]


def _word_tasks(plural) -> list[Task]:
    return [
        Task(
            "plural",
            "words",
            {"noun": NOUNS},
            lambda noun: plural(noun),
            train_templates=(
                "Write the plural of {noun}.",
                "Plural of {noun}:",
                "One {noun}, two",
                "Give the plural form of {noun}.",
            ),
            heldout_templates=("What do you call more than one {noun}?", "Here is a {noun}; there are many"),
        ),
        Task(
            "spell",
            "words",
            {"noun": NOUNS},
            lambda noun: "-".join(noun),
            train_templates=(
                "Spell {noun} with hyphens.",
                "Letters of {noun}:",
                "Spell out {noun}.",
                "How is {noun} spelled?",
            ),
            heldout_templates=("Which letters make {noun}?", "Take {noun} apart, letter by letter."),
        ),
    ]


def _code_tasks() -> list[Task]:
    return [
        Task(
            "sql",
            "code",
            {"table": TABLES, "column": COLUMNS, "number": range(2, 100)},
            lambda table, column, number: f"SELECT * FROM {table} WHERE {column} > {number};",
            train_templates=(
                "SQL for {table} with {column} above {number}:",
                "Query {table} where {column} exceeds {number}.",
                "Find {table} with {column} over {number}.",
                "Show all {table} with {column} more than {number}.",
            ),
            heldout_templates=(
                "Which {table} have {column} greater than {number}?",
                "List {table} whose {column} is higher than {number}.",
            ),
        ),
        Task(
            "snake_case",
            "code",
            {"adjective": ADJECTIVES, "noun": NOUNS, "column": COLUMNS},
            lambda adjective, noun, column: f"{adjective}_{noun}_{column}",
            train_templates=(
                "Name a variable for the {adjective} {noun} {column}.",
                "Variable name: {adjective} {noun} {column}",
                "Python name for {adjective} {noun} {column}:",
                "Write {adjective} {noun} {column} in snake case.",
            ),
            heldout_templates=(
                "Turn {adjective} {noun} {column} into an identifier.",
                "What would code call the {adjective} {noun} {column}?",
            ),
        ),
    ]
