"""Characters of the built-in stories, and the phrases that all plots share. Markup as in
grammar.py."""

GIRLS = "Lily Mia Anna Lucy Ella Zoe Nora Ruby Rosa Ivy Amy Tess Maya Kate Lena Sara Emma Jane"
BOYS = "Tom Tim Ben Sam Max Leo Jack Finn Noah Omar Hugo Theo Luca Oscar Milo Kai Adam Dan"
CREATURES = "Pip Bo Coco Fluffy Pepper Nibbles Biscuit Pebble Mango Peanut Poppy Socks Bramble Olly Momo Toto"

# class of heroes: kind (she~he where they differ) & home & where they live & hand (or paw ...) &
# favourite food
HEROES = {
    "child": """
        girl~boy & house & in a [small|white|yellow|tall|little red|old] house [by the sea|near the woods|on a hill|
            at the end of a quiet street|next to a farm|by the river|at the edge of town] & hand &
            [pancakes|apple pie|warm bread|cookies]""",
    "paw": """
        fox & den & in a den under an old oak tree & paw & berries /
        rabbit & burrow & in a burrow under a green hill & paw & carrots /
        bear & cave & in a [warm|dry|snug] cave in the woods & paw & honey /
        mouse & hole & in a [snug|tiny] hole behind a barn & paw & cheese /
        squirrel & nest & in a nest at the top of a tall tree & paw & nuts /
        hedgehog & den & in a den under a pile of leaves & paw & apples /
        otter & den & in a den by the river & paw & fish /
        mole & tunnel & in a long tunnel under the meadow & paw & roots /
        raccoon & tree house & in an old tree house by the lake & paw & corn /
        kitten & basket & in a basket in a farm kitchen & paw & milk /
        puppy & dog house & in a dog house behind the bakery & paw & bones""",
    "bird": """
        duck & nest & in a nest by the pond & wing & seeds /
        owl & nest & in a hollow tree in the woods & wing & berries /
        robin & nest & in a nest in a green hedge & wing & worms /
        sparrow & nest & in a nest under the roof of a barn & wing & seeds""",
    "folk": """
        elf & house & in a house made from a [red|brown] mushroom & hand & berries /
        fairy & house & in a house inside an old apple tree & hand & honey /
        gnome & house & in a round house under a hill & hand & soup /
        princess~prince & castle & in a castle with [seven|three] tall towers & hand & cake /
        witch~wizard & house & in a crooked house at the edge of the woods & hand & soup /
        giant & house & in a huge house at the foot of a mountain & hand & bread /
        dragon & cave & in a warm cave high in the mountains & claw & toast""",
    "dragon": "dragon & cave & in a warm cave high in the mountains & claw & toast",
    "cloud": "cloud & sky & high in the blue sky & hand & rain",
    "snowman": "snowman & garden & in a garden full of snow & hand & snow",
    "star": "star & sky & high in the night sky & hand & light",
    "robot": "robot & shed & in a shed behind a toy shop & hand & oil",
    "toy": """teddy bear & shelf & on the top shelf of a toy shop & paw & honey /
        wooden horse & shelf & on the top shelf of a toy shop & leg & hay /
        rag doll & shelf & on the top shelf of a toy shop & hand & tea""",
    "boat": "boat & pond & on a pond in the park & hand & water",
    "puppy": "puppy & home & in a house with a big garden & paw & bones",
    "leaf": "leaf & tree & on a high branch of an old tree & stem & sun",
    "train": "train & shed & in a shed by the rails & wheel & coal",
    "ghost": "ghost & attic & in the attic of an old house & hand & dust",
}
# helpers, who give advice: name & introduction & interjection before they speak
HELPERS = {
    "child": """
        the gardener & an old gardener in a green hat & Well, well /
        the baker & the baker from the corner shop & My, my /
        the neighbor & a kind neighbor with silver hair & Oh dear /
        the teacher & the art teacher & Let me see""",
    "wild": """
        the owl & an old owl & Hoo, hoo /
        the turtle & a very old turtle & Slow down, slow down /
        the crow & a clever black crow & Caw, caw /
        the toad & a fat old toad & Ribbit, ribbit /
        the goat & a goat with a long white beard & Well, well""",
}
PARENTS = {"child": "Mom / Dad / Grandma / Grandpa", "wild": "Mama / Papa / Granny"}

RULES = {
    "little": "[little|little|little|small|young|tiny|kind|cheerful|curious|clever|quiet|funny]",
    "tale": """Let me tell you a [[long, |short, |lovely, |strange, |old, |]magical|funny|happy|sweet little|
        wonderful|long] [tale|tale|story].""",
    "named": "[named {h}|named {h}|called {h}]",
    "opening": """[
        [Once upon a time, there was a {little} {kind} {named}. [{He} lived {lived}.|]
        |Once upon a time, there was a {little} {kind} {named} who lived {lived}.
        |Once upon a time, there lived a {little} {kind}. {His} name was {h}.
        |Once upon a time, a {little} {kind} {named} lived {lived}.]
        |[Once upon a time, in a faraway land, there [lived|was] a {little} {kind} {named}. <{He} lived {lived}.>
        |{tale} Once upon a time, in a faraway land, there [lived|was] a {little} {kind} {named}. <{H} lived {lived}.>
        |{tale} Once upon a time, in a faraway land, a {little} {kind} {named} lived {lived}.]
        |[{h} was a {little} {kind}[ who lived {lived}|].
        |There was once a {little} {kind} {named}. [{He} lived {lived}.|]
        |Long, long ago, a {little} {kind} {named} lived {lived}.
        |Far away, [past the blue hills|on the other side of the sea|where the wind is born], there lived a {little}
            {kind} {named}.
        |This is the story of {h}, a {little} {kind} who lived {lived}.
        |There once lived a {little} {kind} {named}. <You would have liked {him}.>]]""",
    "day": """One [sunny|bright|warm|fine|clear|cool|quiet|lovely|spring|summer] [morning|morning|day|afternoon]""",
    "joy": """{h} [jumped up and down|clapped {his} {hands}|laughed out loud|smiled from ear to ear|danced in a
        circle|was so happy that {he} [sang|danced|laughed]|could not stop smiling|gave a loud cheer]""",
    "sad": """{h} [felt a lump in {his} throat|felt like crying|sat down and sighed|hung {his} head|felt very sad|
        let out a long sigh|wanted to cry|felt {his} eyes grow wet]""",
}
