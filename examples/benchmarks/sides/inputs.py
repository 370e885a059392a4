"""What the sides read: random tokens, or a text of many subjects."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase


TEXT = """The committee met on Tuesday to discuss the flood defences along the river, which failed twice last winter.
def area(radius): return 3.14159 * radius ** 2  # metres squared
Translate to German: The train to Hamburg leaves at half past seven from platform nine. Der Zug nach Hamburg fährt um
halb acht von Gleis neun ab. Question: Which planet has the shortest year? Answer: Mercury, which needs 88 days.
To make the sauce, melt the butter, stir in the flour, and add warm milk little by little until it no longer thickens.
The film is a slow, lovely, maddening thing: two hours of rain, and then a last scene that I cannot stop thinking of.
SELECT name, population FROM cities WHERE country = 'Chile' ORDER BY population DESC LIMIT 5;
If Ada has twelve pencils and gives a third of them to Ben, who already had five, how many pencils does Ben have? Nine.
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen; chlorophyll absorbs mostly red and blue.
Dear Ms Okafor, thank you for your letter of 3 March. We regret that the part you ordered is no longer in production.
In the second half United pressed higher, won the ball four times near the box, and equalised from a corner.
Let f be continuous on [a, b] with f(a) < 0 < f(b). Then there is a point c in between at which f(c) = 0.
Patients should take one tablet twice a day with food, and call a doctor if the rash has not gone within a week.
Once upon a time a fox who could count to seven lived under the bridge, and nobody in the village believed him.
{"id": 4071, "status": "shipped", "items": [{"sku": "A-17", "quantity": 2}], "total": 38.5}
Le musée est fermé le lundi, sauf pendant les vacances; l'entrée est gratuite pour les enfants de moins de douze ans.
The court held that the clause was void because neither party could have understood it to cover losses at sea.
Stocks fell for a third day as bond yields rose, although analysts said that the sell-off was thin and would not last.
Granite forms when magma cools slowly underground, which leaves time for large crystals of quartz and feldspar to grow.
git rebase --interactive HEAD~3 lets you reorder, join or drop the last three commits before you push the branch."""


def token_ids(
    kind: str, tokens: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None, batch: int = 1
) -> torch.Tensor:
    """int64 (batch, tokens).

    Args:
        kind (`str`): `"random"` draws tokens; `"trained"`, for trained experts, reads the text, again where it ends.
        tokens (`int`): of a row.
        vocabulary (`int`): size.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): without one, the text is read byte by byte.
        batch (`int`): rows; each continues the text.
    """
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.randint(10, vocabulary - 1, (batch, tokens), generator=generator)
    known = list(TEXT.encode()) if tokenizer is None else tokenizer(TEXT)["input_ids"]
    ids = torch.tensor(known).clamp_max(vocabulary - 1)
    return ids.repeat(-(-batch * tokens // len(ids)))[: batch * tokens].view(batch, tokens)
