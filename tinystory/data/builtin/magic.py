"""Plots about dragons, stars, toys and wishes. Markup as in grammar.py."""

PLOTS = r"""
== the dragon without fire: dragon
try = ate ten hot peppers / blew on a pile of wood all day / drank soup that was still boiling
puff = a soap bubble / a puff of warm air / a small gray cloud / one tired spark

[{opening} All the other dragons could make fire, but {h} could not.|{h} was a dragon, but {he} had no fire.] {He}
{try}. [Nothing!|It did not help.] Out came only {puff}. <"Are you a dragon or a teapot?" the others laughed.> {h}
[hid in {his} cave|flew away to be alone].

[Then the snow came, deep and cold.|That winter was colder than any before.|Then came a winter that would not end.]
One night, {h} heard somebody cough. It was {f.a}, [stiff with cold|lost in the storm]. "[Can you make a fire|Will you
make a fire]?" {f.he} asked. "I cannot," said {h}[ sadly|]. "[All I have is warm air|I only blow warm air]." "[Warm
air is just what I need|Then blow]," said {f}.

So {h} blew, [softly|long and slow], and the snow around {f} melted. {f} stopped shaking. <{h} blew on {f.his} wet
socks, and they were dry at once.> "A real fire would have burned me," said {f}. <"[You are the best dragon in the
mountains|You are as warm as summer]."> [Soon animals came from everywhere to sleep in the warm cave.|That night,
nobody in the woods was cold.|The other dragons could burn things. Only {h} could keep things warm.] <And on {his}
birthday, {h} sneezed, and out came one tiny flame. {He} used it to make {food}.>

== the cloud that would not rain: cloud
place & grew = a garden of dry beans & beans / a field of thirsty flowers & flowers / a brown meadow & grass
why = I will get smaller / the drops will hit somebody / I will be gone

[{opening} All the big clouds rained when they liked, but {h} kept {his} rain inside.|{H.a} floated over the hills.
{He} was full of rain, but {he} would not let it go.] "If I rain, {why}," {he} said. <The older clouds
[laughed|rumbled]. "[A cloud must rain|You will see]," they said.>

{day}, {h} heard crying. Below was {place}, and in the middle sat {f.a}. "[Everything is dying|Please, just a little
water]," {f.he} said, and looked up at the sky. <"Not me," thought {h}. "Someone else will do it." But there was
nobody else in the whole blue sky.> {h} felt {his} heart grow heavy, and heavier. [One drop fell. Plip!|One fat drop
fell, and then it was too late to stop.|Then {he} could not hold it any more. Plip!]

<[It tickled!|Nothing bad happened.]> [Then came another, and a hundred more.|Another drop fell, and another.|Soon it
was a real, fine rain.] {F} [danced in the mud|opened {f.his} mouth and drank]. {h} grew thin and light, [and {he}
laughed|but {he} was not afraid]. <"[Thank you, cloud|More, more]!" called {f}.> At last, there was only a bit of
white mist, and the wind carried it [over the sea|far away]. There {h} [drank and drank until {he} was round
again|filled up with water again]. When {he} came back, the {grew} stood tall and green. <[And on one leaf shone a
drop that looked just like {him}.|"[Hello, {f}!|Are you thirsty?]" {he} called, and {he} began to rain all by
{himself}.]>

== the snowman and the sun: snowman
gift = blue scarf / carrot nose / tall black hat

[{opening} {F.a} had made {him}, and every day they talked and played.|In the garden of {f.a} stood a snowman. {F.he}
had named {him} {h}.] But {h} was afraid of one thing. "[What is the sun like in spring|What happens to me in
spring]?" {he} asked. <{f} did not want to say it.> <{F.he} only pulled {h}'s {gift} a bit tighter.>

[Each day, the sun stayed longer.|The days grew warm.|A bird sang, and the snow on the roof began to slide.] <Drip,
drop.> {h} [got thinner|began to lean]. {f} [built a wall of snow|held an umbrella over {him}], but it did not help.
"[Do not be sad|Do not cry]," said {h}. "I asked [a bird|an old owl|the wind]. [Snow does not end. It only travels.|I
will be a river, and then a cloud.|I am only going on a long trip.]" <"Will you remember me?" asked {f}. "You made my
head," said {h}. "So you are in it.">

One morning, there was only a {gift} in the wet grass. {f} [cried|sat beside it for a long time]. {F.he} [hung it up
by the door|put it in a box|kept it under {f.his} pillow]. [Summer came, and fall.|The year went by.|The leaves turned
green, and then red.] [Then, one night, the first flakes fell.|Then it snowed at last.|One morning, the world was
white.] {f} ran out[ without {f.his} shoes|], built a new snowman, and gave it the old {gift}. The snowman [opened
{his} eyes|smiled|blinked twice]. "[I am back|Hello, {f}]," said {h}. "[I saw the sea! It is so big!|I was a river,
and I ran under a bridge!|I was a cloud, and I saw your house from above!]"

== the fallen star: child paw folk
way & flop = climbed the highest hill & the sky was still too far / tied it to a kite & the kite was not strong enough
    / threw it up as high as {he} could & it came down again, plop

[{opening} One night, something bright fell into {his} garden.|One night, {h.a} saw a light fall from the sky.|Plop!
Something fell into the grass, right beside {h.full}.] It was a star, [no bigger than an apple|small and warm|as small
as a nut|with five points and a cold nose]. "[Ouch|Oh dear|That hurt]," it said. <"[I leaned out too far.|I only
wanted to see the flowers.]"> "[Do not worry|Do not cry|Be brave]," said {h}. "[I will bring you home|We will get you
home|I will find a way to send you back]."

First {he} {way}, but {flop}. <The star lost a little of its light. "I am so tired," it said.> <{h} [sat down to
think|looked up at the dark spot in the sky].> "How did you stay up there before?" {he} asked. "[We sing|We all sing
together]," said the star. "<[The song holds us up.|When we sing, we float.] >But [I cannot sing alone|one voice is
not enough|alone, I am not loud enough]."

"[Then I will sing with you|You are not alone]," said {h}. {He} [did not sing well|sang like a door that needs oil],
but {he} sang [loudly|with all {his} heart]. <{His} friend {f.full} heard it and came out to sing too. Then a dog
joined in.> [The star began to glow.|The star grew bright and warm.|Little by little, the star lit up.] It rose over
the [grass|{home}], over the trees, up and up, until it was home. [Since then, there has been one star that winks at
the {home}.|Every night, {h} waves to it, and it winks.] <If you hum a little before you go to sleep, it may wink at
you too.>

== the robot who could not laugh: robot
joke & did = why the chicken crossed the road & asked if the chicken was safe / a joke about a banana & ate the banana
fell & sound = slipped on a bar of soap & Bump / sat down on a cake & Splat / walked into the pond & Splash

[{opening} {He} could count to a million, but {he} could not laugh.|In the {home} lived a robot named {h}. {He} could
do everything but laugh.] "[What does it feel like|How do you do it]?" {he} asked {his} friend {f}. "[It is like a
sneeze that is happy|It tickles inside]," said {f}. So {f} told {him} {joke}. {h} {did}. <"Ha. Ha. Ha," {he} said. It
sounded like somebody dropping spoons.>

{f} tickled {him} with a feather. That only made {f} laugh. <[They read a funny book.|{F.he} made a funny face.]> "[I
am broken|Maybe it is not in me]," said {h}, and one drop of oil ran down {his} cheek. <"You are not broken," said
{f}. "You are just new.">

{f} jumped up to get a cloth, and {f.he} {fell}. {sound}! <{F.he} looked so surprised!> Something in {h} went click.
Then it went hick, and huck, and [all at once|suddenly] {he} was laughing. {He} laughed until {his} [bolts
shook|lights blinked]. <{f} laughed too. [Neither of them could stop.|"That is it!" cried {f}.]> <The next day, {h}
laughed at breakfast, at a hat, and at the number four.> [Now {he} can count to a million, but {he} never gets past
ten, because seven is so funny.|And the best thing was that {he} could feel it inside, just as {f} had said.]

== the toy that nobody wanted: toy
flaw = one ear was missing / one eye was bigger than the other / the paint had come off {his} nose / there was a hole
    in {his} side

[{opening} {He} waited for a child to take {him} home.|{H.a} lived on the top shelf of a toy shop.] But {flaw}. [Every
day, children came and took the new toys.|Children came, and one toy after another went home with them.] [Nobody
looked up at {h}.|"Not that one," they said.] <At night, the toys talked about the homes they would have. {h} said
nothing.>

[One rainy day, the door opened.|Then, on a cold day, the bell rang.|One evening, just before the shop closed, the
door opened again.] In came {f.a} with wet shoes. [{F.he} looked at the trains and the balls, and then {f.he} looked
up.|{F.he} looked up.] "[Who is that|What about that one]?" {f.he} asked. "That one is [old|broken]," said the man in
the shop. <"[Take a new one.|I was going to throw it away.]"> {h} [held {his} breath|closed {his} eyes].

"[But it looks kind|It looks like it has a story]," said {f}. "[I fall down a lot, too|I have a missing tooth, so we
match]." <The man laughed and did not even ask for money.> That night, {f} [mended {h} with red thread|made {h} a
small coat]. {h} lay on a soft pillow, close to {f.his} ear. "[Are you happy|Is it nice here]?" whispered {f}. <A toy
cannot talk when people are awake.> But {h} [smiled all night long|was so happy that it almost showed]. <And it was
much nicer than the top shelf.>

== one wish: child folk
wish & bad & end = everything were sweet & Even the soup was sweet. Even the rain was sweet, and bees were everywhere
    & a plate of plain potatoes / it were summer every day & The snow was gone, and the sled, and the quiet. {His} ice
    cream melted at once & a cold white snowflake on {his} nose / it were always night so that {he} never had to get
    up & {His} friends slept and slept, and nobody came out to play & the first light of morning / nobody ever said no
    & The dog said yes to the cake, and the goat said yes to the curtains. Nothing was safe & a loud, clear no

[{opening} {day}, {he} pulled a fish out of a net. "Thank you," said the fish. "You have one wish."|{day}, {h.a}
[rubbed an old lamp|opened a dusty bottle]. Puff! "You have one wish," said a deep voice.|"You have one wish," said
the golden fish to {h.full}.] It told {him} to [think well|take {his} time]. But {h} did not [need to think|take any
time]. {He} wished that {wish}.

It was wonderful, [for one day|until lunch]. {Bad}. <"Is this not fun?" {h} asked {his} friend {f.full}. "It was,"
said {f}, "yesterday."> {h} [ran back|went to find the voice again]. "Take it back, please!" {he} cried. "[That costs
something|One wish is one wish]," was the answer. "[You must give away something you love|To undo it, you must give
something you love]."

{h} thought of {his} [red ball|old blue blanket|little drum]. <[It was hard.|{He} held it one more time.]> Then {he}
gave it away. [Whoosh!|There was a flash!] [The world was as before|Everything was as it had been]. And what was [the
best thing in it|the first thing {he} saw|the best part]? It was {end}. <[{h} had never been so glad.|"[Just
right|Hello]," said {h}, "I missed you."]>

== the giant who could not sleep: child paw
noise & soft = the frogs & sang to the frogs until they sang softly too / the wind & hung a blanket in the tree to
    slow the wind / the bells & put socks on the bells / the crickets & asked the crickets to play a slow song

[{opening} On the mountain lived a giant, and he was in a bad mood.|{opening} Boom! Boom! Every night, the giant on
the mountain made the ground shake.|Boom! The plates jumped on the table. "It is the giant again," said {mom} to
{h.full}.] [He stamped and threw stones, and everybody was afraid of him.|He shouted all night, and nobody could
sleep.] "[I will go and ask him why|Somebody should ask him why]," said {h}. <"He will eat you like a pea," said {his}
friend {f.full}. "Then he will still be hungry," said {h}.>

It took {him} all day to climb up. The giant sat [in front of his house|on a fallen tree] with [red eyes|dark rings
under his eyes]. "[What do you want|Who is there|Are you not afraid of me]?" he roared. <{h}'s hat blew off.> "I want
to know [what is wrong|why you shout]," {he} said. The giant [blinked|put down his stone]. <[Nobody had ever asked.|A
big tear fell. It filled a bucket.]> "I am so tired," he said. "[I have not slept for a year|I close my eyes, and
there it is again]. It is {noise}."

So {h} {soft}. Then {he} [told the giant a story|sang an old song that {mom} had taught {him}]. [Before it was
over|After three lines], the giant was asleep. <He snored, but it was a gentle snore, like the sea.> <When he woke up,
he [planted a forest to say sorry|carried everybody's water up the hill for a week].> [Now, when the ground shakes,
they say, "He is only dancing."|And every night, {h} called up the mountain, "Good night, giant!"]

== the shy ghost: ghost

[{opening} {He} was supposed to scare people, but {he} was too shy.|{H.a} was afraid of children. They were so loud!]
When {he} heard steps, {he} hid in [an old trunk|a teapot|the clock]. <"Boo," {he} said to the mirror every morning.
It was a very small boo.>

[One day, a new family came.|Then somebody bought the house.] {F.a} ran up to the attic and opened [the trunk|a box].
"[Aaah|Eek]!" screamed {h}. "[Aaah|Eek]!" screamed {f}. Then they both hid under the same [blanket|table]. "Why are
you screaming?" asked {f}. "[You are a ghost|Ghosts do not scream]!" "[I saw a child|Because you are a child],"
whispered {h}. <[They looked at each other.|It was quiet for a moment.]> Then {f} began to laugh.

"I am scared too," {f.he} said. "[This house is so big, and I have no friends here|I do not like the dark]." "[I can
glow|The dark is nice when you know it]," said {h}, and {he} showed {f.him} [how moonlight comes in through the
roof|all the secret doors]. <They slid down the stairs. They made a tent out of {h}.> [From that night on|After that],
nobody was afraid in the old house, except for the [father|mother] of {f}, who [once sat on {h} by mistake|once washed
{h} with the sheets]. <{He} came out very white.>

== the little boat: boat

[{opening} {He} dreamed of the sea.|{H.a} swam on a pond in the park. Around and around it went, but {he} dreamed of
the sea.] "[The sea is not for small boats|You are made for ducks, not for waves]," said the [swan|old ducks]. But {h}
[looked at the little stream that ran out of the pond|listened to the wind].

One stormy night, {his} rope broke. The rain lifted the pond over its edge, and down the stream went {h}, [over stones
and under bridges|faster and faster]. <[{He} hit a rock and lost some paint.|{He} got stuck in the weeds, and an otter
pushed {him} free.]> <"Which way is the sea?" {he} asked a fish. "Down," said the fish. "It is always down."> In the
morning, {he} smelled salt. There it was, [blue and huge|big and wild]!

A big ship was [stuck between the rocks|lost in the fog]. "[I am too wide for this place|I cannot see the way]," it
said. "[Can anybody help?|Who can show me the way?]" "[I am small, so I can|Follow me]," said {h}. {He} found the
[deep water|way], turn by turn, and the ship came [slowly behind|safely to the open sea]. [The ship asked, "Where do
you come from, captain?"|"Where did you learn that, captain?" asked the ship.|"And where is your home, captain?" asked
the ship.] "[From a pond|On a pond|In a pond|A pond]," said {h} proudly. [And far away, the ducks wondered where {he}
was.|Captain! {h} said the word to {himself} all day long.]

== the gate in the wall: child paw folk
riddle & answer = What gets wetter the more it dries? & A towel! / What has teeth but cannot bite? & A comb! / What
    has hands but cannot clap? & A clock! / What can you catch but not throw? & A cold! / What has legs but cannot
    walk? & A table!
clue = {h} looked around for help / {h} thought so hard that {his} head got hot / {h} asked {his} friend {f.full}, who
    did not know / {h} said everything {he} could think of, and it was all wrong

[{opening} Near {his} {home} was a high wall with a green gate, and the gate was always locked.|{day}, {h.a} found a
gate in an old wall. It was locked.] [Sweet smells came over the wall.|What was behind it?] {He} pushed it. {He}
pulled it. <{He} said please.> "[I do not open for pushing|Stop that, it tickles]," said the gate. "[You must answer
me.|I open for an answer.] {Riddle}"

{clue}. <Then [it began to rain|the sun began to go down], and {h} [sneezed|thought of going home].> [But all at
once|Suddenly], {he} [laughed|jumped up]. "{Answer}" {he} said. "[Correct|At last]," said the gate. <"[It took the
last one forty years.|I was getting bored.]"> And it opened, [creak, creak|with a long, happy creak].

Behind it was a garden, wild and full of [roses|apples|singing birds]. <Nobody had been there for so long that [the
paths were gone|the grass was up to {his} chin].> <In the middle stood a swing, and it was just {his} size.> {h}
[pulled weeds and gave the roses water|went back to get {his} friend {f.full}, and they played until dark]. "[Can we
leave you open|Must you be locked]?" {he} asked the gate. "[Only if somebody comes every day|I was only locked because
nobody came]," it said. So {h} came every day. [And {he} always brought it a new riddle.|And the gate was never locked
again.]
"""
