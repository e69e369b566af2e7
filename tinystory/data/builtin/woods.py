"""Plots outdoors: woods, weather, animals. Markup as in grammar.py."""

PLOTS = r"""
== the kitten in the tree: child folk
color = gray / white / black / orange
fail & why = {he} called to it in a sweet voice & the kitten did not know how to come down / {he} held up a bowl of
    milk & the kitten only licked its nose / {he} shook the tree & the kitten held on even tighter
fail2 & why2 = {he} got a ladder & it was too short / {he} tried to climb up & the first branch broke with a crack /
    {f} threw a rope & it fell back on {f.his} head
idea = {his} big basket on a long rope / an old fishing net / {his} bed sheet, and {f} held the other end / {his}
    winter coat, spread out wide

[{opening} {day}, {he} heard a [sad|thin] little sound.|{day}, {h.a} was [on the way home|out for a walk]. "Meow!"
said somebody above {him}.|"Meow! Meow!" {h} stopped. Where did that sound come from?] {He} looked up. High in [an old
oak|the apple tree|a tall tree] sat a {color} kitten[, and it was shaking|]. <"You went up so fast," said {h}. "Why
can you not come down?"> {He} [called|ran to get] {his} friend {f.full}.

First {fail}, but {why}. <"Meow," it said, which means no.> Then {fail2}, but {why2}. <[It began to rain.|A cold wind
blew, and the tree swayed.|It was getting dark.]> <The kitten closed its eyes. {h} felt sorry for it.> "[What now|What
shall we do]?" asked {f}.

{h} [looked at the tree and thought|walked around the tree three times]. "[I have it!|I know!]" {he} said, and {he}
ran home. {He} [came back with|brought] {idea}. They held it [under the branch|under the tree|out like a sail].
"[Jump|Let go], little one," {h} said [softly|in a warm voice]. <"[We will catch you.|Do not be afraid.]"> [The kitten
looked down.|The kitten thought about it.] It [shut its eyes|wiggled its tail] and jumped. Plop! [It was safe.|They
had it!]

[The kitten licked {h} on the nose.|The kitten began to purr so loudly that they both laughed.] [{h} took it home, and
they named it Leaf, because it came down from a tree.|It followed {h} home and slept on {his} feet that night.|An old
woman came running. "You found my kitten!" she cried, and gave them each a warm bun.] <The next day, the kitten was up
in the tree again. But now it knew how to jump.>

== the lonely wolf: child paw
food & smell = soup & of onions / bread & of warm bread / berry pie & of berries / honey cake & of honey
lie = he had eaten a whole horse / his teeth were as long as knives / his eyes could turn you to stone / he ate shoes
    for breakfast

[{opening} Near {his} {home} was a dark wood, and nobody went there, because of the wolf.|{opening} Everybody was
afraid of the wolf who lived on the hill.|All the neighbors talked about the big gray wolf.] They said that {lie}. [At
night, you could hear him.|When the moon was up, he howled.] "[Awooo!|Aoooo!]" <{His} friend {f.full} always put
{f.his} {f.hands} over {f.his} ears.> But {h} listened and thought, "[He does not sound angry. He sounds sad.|That is
a sad song.]"

{day}, {h} [packed a pot of {food}|put some {food} in a basket] and went [to see|to find] the wolf. <{His} knees were
shaking.> <The trees were tall, and the path was [narrow|dark].> <Snap! It was a twig. {h} jumped, but it was only
{his} own foot.> Then two yellow eyes [looked out of the bushes|shone in the dark]. "[Why are you not running
away?|Who is there?]" asked a deep voice. <"[They all run away.|Nobody comes here.]">

"I [wanted to run|almost ran away]," said {h}, "but I [have {food}|brought {food}], and it is too much for one." <The
wolf's nose moved. It smelled {smell}.> <[He came closer. He was very big and very thin.|Step by step, he came into
the light.]> [They sat down and ate.|They shared it on a stone.] <The wolf ate with good manners and did not spill a
drop.> "Why do you howl at night?" asked {h}. The wolf looked [at his feet|away]. "[I call to see if someone will
answer|I sing to the moon, because the moon does not run away]," he said. <"[So far, nobody has sung back.|It is so
quiet up here.]">

That [night|evening], [the wolf howled|"Aoooo!" came from the hill]. And {h} opened {his} window and [howled
back|answered], "Aoooo!" <It was [quiet|still] for a moment.> Then came [the happiest howl you ever heard|a howl that
was almost a laugh]. <Soon {his} friend {f.full} opened {f.his} window and howled too.> [After that, the wolf came to
eat every evening, and he always washed the plates.|By spring, the wolf was giving the little ones rides on his
back.|Now nobody puts their hands over their ears. When the wolf sings, they all sing with him.]

== too small: paw child folk
game = a ball game / tag / pirates / kings and dragons
lost & key & gap = my key & key & into a crack in the floor / my gold ring & ring & between two big stones / our only
    ball & ball & down a narrow hole / my silver spoon & spoon & into a thin pipe

[{opening} {He} was the smallest of all {his} friends.|{h.full} was so small that {he} could [sleep in a shoe box|hide
behind a mushroom|sit under a chair and not touch it].|{opening} "I wish I were big," {he} said every night.] {day},
the others were playing {game}. "Can I play?" asked {h}. "[You are too small|This is only for big ones]," they said.
<"[Somebody will step on you.|Come back when you are bigger.]">

[{h} went home and tried to grow.|So {h} tried to get bigger.] {He} [ate two plates of {food}, but only {his} tummy
grew|stood in the rain, because that helps flowers]. <{He} [hung from a branch until {his} arms hurt|stood on {his}
toes all day].> <Then {mom} measured {him}. {He} was just as small as before, and a bit wet.> <"Good things come in
all sizes," said {mom}. {h} did not think so.>

[Then, one day|The next day], {he} heard [a shout|somebody crying]. It was {his} friend {f.full}. "I dropped {lost},"
{f.he} said. "It fell {gap}!" [Everybody tried to get it out.|They all came to help.] The biggest one [pushed in his
arm, and it got stuck|pushed until he was red in the face].  <The next one [used a long stick, but that only pushed it
deeper|could not get even one finger in]. "[It is no use|We will never get it]," said {f}.>

"Let me try," said [a small voice|{h}]. They all [turned around|looked down]. {h} [lay on {his} belly and put in {his}
thin little {hand}|took a deep breath and made {himself} even smaller]. <It was dark, and something tickled {his}
nose.> "[I have it!|Got it!]" {he} called. Out came {h}, [covered in dust|gray with dust], with the {key} held high.
"[You are just the right size|You are not too small at all]," said {f}<, and [everybody cheered|they carried {him}
around three times]>.

<[From then on, they never played without {him}.|That night, {h} did not wish to be big.|The next day, they asked
{him} to play first.]> <And if there was a hole to look into or a hat to hide in, {h} was the one for it.>

== the big race: paw
prize = a jar of honey / a gold cup / a crown of flowers / a big red drum
slow = short legs / sore feet / a bad cold / a heavy tail
help = had stepped on a thorn / was stuck in the mud / had fallen into a hole / had hurt {f.his} foot

[{opening} Every [spring|summer], there was a race around the lake.|{day}, all the animals met for the big race around
the hill, and {h.full} came too.|"Ready?" called the old crow. All the animals stood in a line, and at the end stood
{h.full}.] The winner would get {prize}. {h} wanted to win it [so much|more than anything]. [Last year, {he} had been
last.|But {he} had {slow}.] {f.full} was the fastest of all, and {f.he} knew it. <"[I could win with my eyes closed|I
will be home for lunch before you are done]," said {f}.>

[One, two, three, go!|"Go!" cried the crow.] [Off they went.|The race began.] {f} was gone like the wind. <{h} ran as
well as {he} could, [puff, puff, puff|up the hill and over the bridge].> <One after another, the others ran past
{him}.> <"Keep going," {he} told {himself}. "One foot, then the other foot.">

Then, [near the end|by the river], {he} [saw somebody by the path|heard someone cry out]. It was {f}, and {f.he}
{help}. "[Run on|Go]," said {f} sadly. <"[You can still win.|They will all pass us.]"> {h} looked at the
[road|finish], and then {he} looked at {f}. "[A prize is only a prize|There is a race every year]," said {h}, and {he}
stopped to help. <{He} pulled and pushed until they were both covered in mud.> {f} put one arm around {h}, and they
went on together, [slowly|step by step].

They [came in last|were the last of all]. <[But everybody was standing and clapping.|Nobody laughed.]> "[Somebody was
faster|The old hare won the race]," said the crow, "but [nobody was better|I know who ran best]." And so {h} got
{prize}. [{h} held one side, and {f} held the other.|{h} and {f} carried it home together.] <"Next year," said {f}, "I
will wait for you.">

== lost in the woods: child paw
lure = a blue butterfly / a trail of mushrooms / a shiny beetle / a rabbit with a white tail
clue & how = the river & the river ran past {his} {home}, so {he} followed the water / the evening star & {mom} had
    said that the star stands over their {home}, so {he} walked toward it / the smell of smoke & somebody was cooking,
    so {he} followed {his} nose / a far bell & {mom} rang the bell every evening, so {he} followed the sound

[{opening} {day}, {he} saw {lure}.|{day}, {h.a} went to the woods to [pick berries|find wood for the fire]. "Stay on
the path," said {mom}. But then {he} saw {lure}.] "[Wait for me!|How pretty!]" said {h}, and {he} followed it, [around
a bush and over a log|left and right and left again]. <It went deeper and deeper into the woods.> When {he} looked up,
[the path was gone|nothing looked the same].

"Hello?" called {h}. "[Hello, hello|Lo, lo]," said the [woods|hills]. <[It was only the echo.|Nobody else answered.]>
{He} went one way, and came to [a wall of thorns|a big rock]. {He} went the other way, and came back to the same old
log. <[The shadows grew long.|It was getting cold.]> <Something rustled. Was it a bear? No, it was a leaf.> <{h} [sat
down and cried a little|wanted to cry].>

Then {he} remembered what {mom} always said. "[When you are lost, stop and listen.|If you do not know the way, sit
still and use your eyes and ears.]" So {h} [sat very still|was very quiet]. <{He} heard a bee, and {his} own heart.>
And then {he} noticed {clue}. {How}. <It was not easy. There were roots and stones, and {he} fell down once.>

[Soon the trees grew thin, and {he} saw a light in a window.|And there, behind the last tree, was {his} {home}.] {mom}
was standing [in the door|outside with a lamp]. "[You are late for dinner|Where have you been]!" said {mom}, and
hugged {him} so hard that {he} could not breathe. <"I got lost," said {h}, "but I [listened|found myself again].">
<[There was hot soup.|{mom} made {him} a cup of hot milk.]> <"And what did you follow?" asked {mom}. "{Lure}," said
{h}. {mom} laughed. "Next time, ask it to come to us.">

== enough for winter: paw
store = nuts / apples / seeds / corn

[{opening} All [summer|fall] long, {he} worked hard. {He} put {store} in {his} {home}, [one by one by one|until it was
full to the roof].|Winter was coming. {h.full} ran up and down all day with {store}.|{H.a} had a secret. Behind {his}
bed was a great heap of {store}, all for the winter.] {f.full} did not work. {F.he} [sang|danced|played] in the sun.
"[Winter is far away|Come and dance]!" {f.he} called. "[I have no time|Winter does not wait]," said {h}.

[Then the snow came.|One morning, the snow was there.|Then winter came.] <It [fell and fell|covered everything].> {h}
sat in {his} warm {home} and ate {store}. <{He} ate them for breakfast, for lunch, and for dinner. It was warm, but it
was very, very quiet.> [One night, there was a knock at the door.|Then somebody knocked, very softly.] Outside stood
{f}, [blue with cold|with snow on {f.his} nose]. "I have nothing to eat," {f.he} said[ in a small voice|]. <"[You were
right about winter.|I should have worked.]">

{h} looked at the {store}. [{He} had counted every one.|Would there be enough for two?] "You played all summer," {he}
said[, and {he} began to close the door|]. <[{f} nodded and turned away.|"I know," said {f}. {F.he} did not even ask
again.]> <The wind howled. {F.his} footprints were already white.> [Then|But] {h} [thought of the long, quiet
nights|remembered the songs of summer]. "Wait!" {he} called. "Come in[, quickly|]. [I have food, but I have no
songs.|I cannot eat with an empty chair across from me.]"

So {f} came in. {h} shared the {store}, and {f} [sang all {f.his} summer songs|told funny stories], and the winter did
not seem so long. <[In spring, there was one last bit of food, and they cut it in half.|When the snow melted, they
were both thin, but they were friends.]> And the next summer, {f} helped to find the {store}. <{F.he} sang while
{f.he} worked, and {h} found that work goes faster with a song.>

== the moon in the pond: paw folk
tool = a bucket / a fishing net / a big spoon / a hat

[{opening} {He} loved the moon, and one night {he} went out to look at it.|{opening} One night, {he} could not sleep,
so {he} went for a walk.|One night, {h.a} was walking home.] [When {he} came to the pond|Down in the pond], {he} saw
something round and white in the water. "Oh no!" cried {h}. "The moon has fallen in!< [It will get cold.|The fish will
eat it.]>"

{He} ran to get {tool}. {He} [reached out|leaned over] and scooped. Splash! The moon [broke into a hundred
bits|wobbled and broke]. <"Sorry, moon!" said {h}.> <[When the water was still|A moment later], it was whole again.>
{He} tried once more. <Splash!> {He} only caught [a very angry frog|one green weed|a surprised fish]. Then {he} leaned
too far and fell in. <Now there was water in {his} ears.>

{f.full} came to see what the noise was. "[What are you doing in the water|Is it bath night]?" {f.he} asked. "I am
saving the moon!" said {h}. {F} [bit {f.his} lip so as not to laugh|looked at the pond, and then at the sky]. "[Look
up|Turn around and look up]," {f.he} said. And there was the moon, high over the trees, [dry and bright|where it
always was].

<{h} [looked up, and down, and up|turned red].> "[It climbed back!|I did it!] [Did you see that?|My splash pushed it
up!]" {he} said. <{f} [thought about that|opened {f.his} mouth and closed it again].> "[Well done|That was very kind
of you]," said {f}. <{F.he} put a dry scarf around {him}.> [They sat by the pond for a while.|They stayed there until
the frogs went to bed.] <[Above them was one moon, and below them was another, and there was one for each.|"Good
night, moon," said {h}. And down in the water, the moon seemed to wink.]>

== all together now: paw folk
thing & where & wait = wooden boat & stuck in the mud & they wanted to sail to the island / giant pumpkin & stuck in
    the ground & they wanted to make soup for everyone / old cart & stuck in a ditch & they had to take apples to the
    fair / great log & across the path & nobody could get home
small = ladybug / ant / tiny snail / baby mouse

[{opening} {day}, {he} found {his} friend {f.full} by the road. {F} looked hot and angry.|{day}, {h.full} and {his}
friend {f.full} had a problem.] [There was|It was] a {thing}, and it was {where}. And {wait}! <"[One push, and it is
done|I am strong]," said {h}.> {He} pushed until {his} face was red. <"Let me pull while you push," said {f}.> [They
pulled and pushed.|They worked until they were hot and tired.] <[Nothing!|It did not move one bit.]>

[So they called {g.a}.|{G.a} came by.] "{g.hm}," said {g}, "[I will help|that looks heavy]." <Now there were three.>
One, two, three, pull! The {thing} [shook a little|made a sad noise], and that was all. <They called a bear. The bear
called his wife. Soon there was a long line of them, all holding on to each other. One, two, three, pull! They all
fell over backward.>

Then came a {small}. "[Can I help|Do you need help|May I pull, too]?" it asked. <[Everybody laughed.|"You?" asked {f}.
"You weigh less than a leaf."]> <"[Thank you, but you are too small|You might get hurt]," said {h}.> "[I am small, but
I am one more|One more is one more]," it said. <[{h} thought about that.|{h} scratched {his} head.] "[That is true|You
are right]," {he} said.> So the {small} took hold at the very end. One, two, three, PULL!

[Pop!|Swoosh!] The {thing} [came free|moved], and they all [sat down in the grass|rolled into a heap]. <"You see?"
asked the {small}.> <[Who had done it?|"So who was it?" asked {f}.] [Some said it was the bear, and some said it was
{g}.|"All of us," said {h}.]> That evening, they had [a feast|a party], and the {small} sat [in the best chair|at the
top of the table].

== the first flight: bird
place = branch / roof / rock
trick & need = {mom} held out a fat worm & {he} only got hungry / {his} brother flew in circles to show how easy it
    was & {he} only got dizzy / {he} closed {his} eyes and counted to ten & {he} opened them again at nine

[{opening} All {his} brothers and sisters could fly, but {h} could not.|{H.a} sat on the edge of a {place} and looked
down. <It was a long way down.>] "[It is easy|You just jump]," said {mom}. "[But what if I fall|Why is the ground so
far away]?" asked {h}. <{His} heart went bump, bump, bump.> First {trick}, but {need}. "[Tomorrow|Maybe tomorrow],"
{he} said. <But the next day, it was the same[, and the day after that|].>

[One evening|One windy day], {he} heard a cry. [Down by the river|Far below], {f.a} had slipped on a wet stone. The
water [was pulling {f.him} away|was fast and cold]. "Help!" {f} cried. <[There was nobody else.|Nobody else was
near.]> {h} did not think about the ground. <{He} did not think at all.> {He} jumped.

<[The air rushed past {his} ears.|Down, down, down {he} went.]> Then {he} opened {his} wings, and [the wind picked
{him} up|they held {him}]. {He} [was flying|flew]! {He} took [a long stick|a branch] in {his} beak and held it out.
{f} grabbed it and [climbed|pulled {f.himself}] to the shore. "[You saved me|Thank you]!" {f.he} said<, dripping>.
"How long have you been [flying|able to fly]?"

"[Since just now|About one minute|For three trees]," said {h}<, and then {he} had to sit down[, because {his} legs
were shaking|]>. <{mom} told everyone, and the whole wood knew by dinner.> [The next day, {h} sat on the edge of the
{place} again. {He} looked down. It was still a long way. {He} smiled and jumped.|And {he} flew home, the long way,
three times around the moon.]

== the lost egg: child paw folk
color & not1 & not2 = blue with brown spots & an owl & a duck / white and round & a turtle & a swan / pale green & a
    crow & a goose

[{opening} {day}, {he} found an egg in the grass.|{day}, {h.a} almost stepped on something. It was an egg!|"What is
this?" asked {h.full}. In the grass lay an egg.] It was {color}, and it was [still warm|getting cold]. <"[Somebody
must be missing you|You are far from home]," said {h}.> {He} [put it in {his} hat|held it close] to keep it warm and
went to find its mother.

{He} asked {not1}. "[Not mine|That is not mine]," it said. <"[Mine are all at home.|I would never lose an egg.]"> {He}
asked {not2}. "[Mine is bigger|It is pretty], but it is not mine." <{He} even asked a cow. The cow just looked at
{him} and chewed.> So {h} took the egg home and [put it by the fire|made it a nest of warm socks]. All night, {he}
sang to it[ quietly|].

[In the morning, there was a sound.|When the sun came up, the egg moved.] Tap, tap, crack! [A wet little head came
out.|Out came a wet little bird.] "[Mama|Are you my mama]?" it asked. <"[Oh no|Oh dear]," said {h}. "I am not your
mama.[ I cannot sing.|]"> The baby bird [followed {him} everywhere|sat on {his} foot]. <It ate like a horse. It was up
at five.> {h} loved it, but [{he} could not teach it to sing|somewhere its mother was sad].

[One day|A few days later], a [brown|small] bird [sat on the roof and sang|flew in circles over the grass and called].
The baby bird [lifted its head|jumped up]. It [sang the same song|knew that song|called back]! [{h} opened the
door|{h} held it up high in both {hands}]. <"[Go on|There she is]," {he} said, and {his} eyes were wet.> The two birds
[flew around each other|sat wing to wing], singing and singing. <[In the evening|Before it grew dark], the little one
came back and [left a feather on the window|sang at {his} window]. [And every spring it came again, with babies of its
own.|"Good night," said {h}. "You have the best song in the sky."]>

== one umbrella: child paw folk
roof & color = umbrella & red / umbrella & yellow / umbrella & green / umbrella & blue with white dots
first = a wet kitten / a mouse with a cold / a small gray rabbit / a puppy with a sad face
last = a very big bear / a fat cow / an old horse / a gray donkey

[{opening} {He} had a new {roof}. It was {color}.|{H.a} had a new {roof}, {color} and shiny. {He} could not wait for
rain.] <{He} [looked at the sky every morning|slept with it beside {him}].> [One day|At last], drip, drop! [The rain
came down.|It rained.|The sky turned gray and wet.] {h} ran out and opened {his} {roof}. <[Plip, plop, plip, it
sang.|The drops danced on top of it.]> <It was the best sound in the world.>

Under a [bush|bench] sat {first}. "[May I come in|Is there room for me]?" it asked. {h} [looked at the new
{roof}|thought about it]. "[There is room for two|Come in]," {he} said. Then came {his} friend {f.full}, [without a
coat|wet from head to toe]. <"[Room for one more?|May I?]" {f.he} asked. "[Hmm. Breathe in|If we stand close]," said
{h}.> <Then came three frogs, but they only wanted to know the time. Frogs like rain.>

Last of all came {last}. "[I do not think I will fit|I am too big]," it said sadly. <[Rain ran down its nose.|It was
so wet that it dripped.]> <They [all looked at each other|tried, but it was no use].> If {h} held the {roof} over one,
another got wet. {h} [thought hard|had an idea]. "[Climb up|I know], everybody!" {he} said. "[On its back! And I will
sit on top and hold the {roof}.|If we all sit on its back, one {roof} is enough.]"

[What a sight it was!|So they went home like that.] <[They sang all the way.|Everyone was dry except for some feet.]>
<People looked out of their windows and pointed.> [When the sun came out, nobody wanted to get down.|At every door,
one of them got down and said thank you.] "[A small roof is big enough|It is a good {roof}]," said {h} that night, "if
you [share it|hold it up high enough]."
"""
