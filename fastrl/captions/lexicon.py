"""Word lists of the caption parser: words that begin, describe, link and end noun phrases, and rules for plurals."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    "a an the this that these those some several many few both each every another other his her its their our your my "
    "various numerous multiple all most any more additional different certain such"
)
NUMBERS: Mapping[str, str] = MappingProxyType(
    {
        w: str(n)
        for n, w in enumerate(
            ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
        )
    }
)
NEGATIONS = _words("no without not never neither nor")

COLORS = _words(
    "red green blue yellow purple orange cyan black white gray "
    "grey brown pink beige tan gold golden silver maroon navy "
    "teal turquoise violet magenta cream colorful blonde blond dark light bright pale"
)
ADJECTIVES = COLORS | _words(
    "small large big tiny huge little tall short long wide narrow thick thin giant massive miniature medium "
    "round square-shaped rectangular circular oval flat curved straight triangular "
    "wooden metal metallic plastic leather stone concrete brick "
    "paved grassy sandy snowy rocky dirt glass ceramic marble "
    "striped plaid spotted checkered dotted floral patterned "
    "old young new modern antique vintage ancient elderly adult "
    "open closed empty full parked wet dry dirty clean broken stuffed sliced cooked fresh ripe baked grilled fried hot "
    "cold warm sunny cloudy rainy busy crowded quiet beautiful pretty lovely cute happy sad fluffy furry fuzzy hairy "
    "lush green-colored tasty delicious assorted mixed fancy nice cozy comfortable elegant decorative ornate "
    "double single white-colored wild domestic baby male female asian military professional urban rural public "
    "smaller larger bigger taller shorter closer nearer older younger "
    "smallest largest biggest tallest main central outdoor "
    "indoor local snow-covered grass-covered multicolored multi-colored "
    "well-lit red-haired lit high low deep shallow heavy"
)
ADJECTIVE_ENDINGS = ("ous", "ful", "less", "ive")
COPULAS = _words("is are was were be being been appears appear seems seem looks look")
# Finite verbs that captions use; words in -ing count as verbs by themselves unless they are among the nouns below.
VERBS = COPULAS | _words(
    "has have had shows show showing shown features feature featuring captures capture depicts depict contains contain "
    "includes include displays display stands stand sits sit sat stood lies lie lay holds hold held wears wear worn "
    "rides ride rode "
    "walks walk runs run plays play eats eat ate flies fly flew hangs hang hung carries carry pulls pull pushes push "
    "looks looked watches watch rests rest lays sleeps sleep jumps jump leans lean grazes graze drives drive drove "
    "swims swim surfs skates throws throw catches hits hit swings swing "
    "reaches reach touches touch covers covered cover surrounds "
    "surrounded surround filled fills lined placed located positioned situated seated parked_at attached made seen "
    "uses use makes make takes take gets get goes go comes come gives "
    "give talks talk prepares prepare cuts cut serves serve "
    "served topped decorated dressed tied loaded stacked arranged gathered displayed mounted visible do does did "
    "can could may might "
    "will would should must enjoys enjoy adds add creates create suggests suggest indicates indicate provides provide "
    "waits wait poses pose crosses cross passes pass travels travel smiles smile faces fall falls"
)
ING_NOUNS = _words(
    "building ceiling clothing railing painting wing ring king string thing morning evening crossing awning siding "
    "flooring lighting wiring topping icing frosting stuffing dressing "
    "pudding dumpling duckling sibling wedding parking "
    "shed sled seed weed bread bleed breed steed watershed "
    "sling spring bedding earring covering opening landing marking drawing engraving carving seating"
)
LY_NOUNS = _words(
    "family butterfly fly dragonfly lily belly jelly bully ally rally reply assembly supply anomaly doily"
)
# Linking phrases → the name under which relations are compared; longer ones are matched first.
RELATIONS: Mapping[str, str] = MappingProxyType(
    {
        "to the left of": "left of",
        "on the left of": "left of",
        "on the left side of": "left of",
        "left of": "left of",
        "to the right of": "right of",
        "on the right of": "right of",
        "on the right side of": "right of",
        "right of": "right of",
        "above": "above",
        "over": "above",
        "below": "below",
        "under": "below",
        "underneath": "below",
        "beneath": "below",
        "on top of": "on",
        "atop": "on",
        "on": "on",
        "onto": "on",
        "upon": "on",
        "in front of": "in front of",
        "behind": "behind",
        "in back of": "behind",
        "next to": "next to",
        "beside": "next to",
        "alongside": "next to",
        "near": "next to",
        "close to": "next to",
        "by": "next to",
        "adjacent to": "next to",
        "in the middle of": "in",
        "inside of": "in",
        "inside": "in",
        "in": "in",
        "into": "in",
        "within": "in",
        "outside of": "outside",
        "outside": "outside",
        "between": "between",
        "among": "among",
        "amongst": "among",
        "around": "around",
        "across from": "opposite",
        "opposite": "opposite",
        "across": "across",
        "along": "along",
        "through": "through",
        "against": "against",
        "with": "with",
        "at": "at",
        "from": "from",
        "down": "down",
        "up": "up",
        "off": "off",
        "towards": "toward",
        "toward": "toward",
        "past": "past",
        "for": "for",
        "of": "of",
        "to": "to",
        "as": "as",
    }
)
VAGUE_RELATIONS = frozenset({"of", "to", "for", "as", "from"})  # they state no relation between objects
# Words that end a noun phrase without being part of it.
FUNCTION = _words(
    "and or but while who which that's where when what there it they them he she him i we you is it's as than then so "
    "also too very quite just only even still together apart away "
    "out here near-by nearby possibly likely perhaps overall "
    "additionally however because if both's s t who's each's something someone everything anything nothing itself "
    "themselves himself herself one's well not against's etc about during after before until since"
)
# Words for the picture itself and for parts of it: never objects (CAPTURE's stop words, our own list).
STOP_NOUNS = _words(
    "image picture photo photograph scene view shot background foreground side top bottom front back left right center "
    "centre middle corner edge end part piece portion section group number variety couple lot set pair bunch row line "
    "collection assortment array setting atmosphere environment surrounding area space place spot position direction "
    "distance day time moment presence sense type kind style way manner activity action sort thing item object element "
    "detail color colour shape size width appearance feel addition total example variety composition camera viewer "
    "close-up closeup description caption display bit amount mix team level range order use interest focus lens angle"
)
SCENE_NOUNS = _words("circle square triangle diamond star cross")  # both shapes and adjectives elsewhere

_IRREGULAR: Mapping[str, str] = MappingProxyType(
    {
        "series": "series",
        "species": "species",
        "people": "person",
        "men": "man",
        "women": "woman",
        "children": "child",
        "policemen": "policeman",
        "firemen": "fireman",
        "knives": "knife",
        "leaves": "leaf",
        "shelves": "shelf",
        "loaves": "loaf",
        "halves": "half",
        "wolves": "wolf",
        "calves": "calf",
        "scarves": "scarf",
        "wives": "wife",
        "mice": "mouse",
        "geese": "goose",
        "teeth": "tooth",
        "feet": "foot",
        "oxen": "ox",
        "sheep": "sheep",
        "cattle": "cattle",
        "skis": "skis",
        "scissors": "scissors",
        "shears": "shears",
        "shoes": "shoe",
        "buses": "bus",
        "busses": "bus",
        "cookies": "cookie",
        "movies": "movie",
        "selfies": "selfie",
        "veggies": "veggie",
        "brownies": "brownie",
        "ties": "tie",
        "pies": "pie",
        "wineglasses": "wineglass",
        "glasses": "glasses",
        "sunglasses": "sunglasses",
        "clothes": "clothes",
        "grass": "grass",
        "glass": "glass",
        "axes": "axe",
        "houses": "house",
        "horses": "horse",
        "racehorses": "racehorse",
        "vases": "vase",
        "purses": "purse",
        "cases": "case",
        "suitcases": "suitcase",
        "briefcases": "briefcase",
        "noses": "nose",
        "roses": "rose",
        "hoses": "hose",
        "blouses": "blouse",
        "faces": "face",
        "tennis": "tennis",
        "lens": "lens",
        "gas": "gas",
        "canvas": "canvas",
        "iris": "iris",
        "christmas": "christmas",
    }
)


def singular(word: str) -> str:
    """The singular of a lower-case English noun, by rule and a list of exceptions; other words mostly stay."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "toes", "goes", "does")):
        return word[:-2]
    return word[:-1]
